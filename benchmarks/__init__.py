"""Programs that print measured tables. They are run by hand, never by the tests."""
