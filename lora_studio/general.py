"""A small general text that no run trains on: by how much the loss on it rises, so much has the model forgotten.

It was written for this purpose. Whoever changes a word makes the figures of earlier runs a measure of something else.
"""

from collections.abc import Sequence
from typing import Any

from lora_studio.data.batches import Encoded, encode_all
from lora_studio.data.formats import Example, Message

TOKENS = 104  # of a passage that are read; with usual tokenizers that is all of it

PASSAGES = (
    # a recipe
    "Lentil soup for four. Chop an onion, two carrots and a stick of celery, and let them soften in olive oil over a"
    " low heat for ten minutes. Stir in a spoonful of cumin and a cup of red lentils, pour in a litre of stock, and"
    " simmer until the lentils fall apart. Finish with lemon juice, salt and pepper, and serve with bread.",
    # a letter
    "Dear Helen, thank you for the photographs, which arrived on Tuesday. We have put the one from the harbour above"
    " the fireplace. The roof is mended at last, although it rained through the kitchen ceiling twice before the"
    " builder came. Do visit us in the spring; the spare room is yours for as long as you like. With love, your aunt.",
    # a report
    "The city council voted on Monday to close the old bridge to cars for six months while its foundations are"
    " repaired. Buses will be sent over the northern crossing, adding about twelve minutes to a journey. Shop owners"
    " fear for their trade, but engineers said that cracks found last winter left them with no other choice.",
    # a piece of code
    "def average(values):\n    total = 0\n    for value in values:\n        total += value\n    if not values:\n"
    "        return None\n    return total / len(values)\n\nprint(average([2, 4, 9]))  # prints 5.0\n",
    # sums
    "A train leaves at nine and travels 180 kilometres in two hours, so its speed is 180 / 2 = 90 kilometres per hour."
    " At the same speed it needs three hours for 270 kilometres and arrives at noon. A ticket costs 24 euros; five"
    " tickets cost 5 * 24 = 120 euros, and with a discount of ten percent, 120 - 12 = 108 euros.",
    # talk
    '"Have you seen my keys?" asked Tom. "They were on the table when I went to bed." "Look in your coat," said his'
    ' sister without raising her eyes from the newspaper. He did, and there they were. "You always know," he laughed.'
    ' "I only know you," she answered.',
    # an explanation
    "The moon causes the tides. Its gravity pulls the water on the near side of the earth a little more strongly than"
    " the ground beneath it, and the ground more strongly than the water on the far side. So two bulges form, and as"
    " the earth turns, most coasts pass through high water twice a day.",
    # directions
    "To get to the museum, leave the station by the south exit and walk along the canal as far as the second"
    " footbridge. Cross it, turn left at the bakery, and go up the hill past the school. The entrance is behind"
    " the tall chestnut tree; on Thursdays it is open until eight in the evening, and children come in free.",
    # a life
    "Maria Anna Keller was born in 1847 as the third daughter of a clockmaker. At sixteen she built her first telescope"
    " from two old lenses, and for thirty years she drew the surface of the moon, night after night, in a garden shed."
    " Her maps, printed only after her death, were in use well into the next century.",
)


def passages(tokenizer: Any, most: int = TOKENS) -> list[Encoded]:
    """The text as a tokenizer reads it; of each passage at most `most` tokens."""
    return encode_all(tokenizer, examples(), min(most, TOKENS))


def examples(labels: Sequence[str] = ()) -> list[Example]:
    """The passages as rows; for a classifier with a label, which says nothing."""
    if labels:
        return [Example((Message("user", passage), Message("assistant", labels[0]))) for passage in PASSAGES]
    return [Example(text=passage) for passage in PASSAGES]
