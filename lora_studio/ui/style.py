"""How the page looks and is served: theme, style sheet, logo, and the launch options that go with them."""

from pathlib import Path

from gradio.themes import Base, LocalFont
from gradio.themes.utils import colors, sizes

from lora_studio.limits import Limits

HERE = Path(__file__).parent
ACCENT, ACCENT_DARK = "#4f46e5", "#4338ca"
LOGO = (HERE / "logo.svg").read_text(encoding="utf-8")


def theme() -> Base:
    """One accent colour on tinted neutrals; only the font files of Gradio that are whole (weights 400 and 700)."""
    plex, mono = (LocalFont(f"IBM Plex {kind}", weights=(400, 700)) for kind in ("Sans", "Mono"))
    return Base(
        primary_hue=colors.indigo,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_md,
        text_size=sizes.text_md,
        font=[plex, "system-ui", "sans-serif"],
        font_mono=[mono, "ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_border_width="0px",
        block_label_text_size="*text_sm",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus=ACCENT,
        checkbox_label_background_fill="white",
        checkbox_label_background_fill_dark="*neutral_900",
        checkbox_label_border_width="1px",
        checkbox_label_border_color="*neutral_300",
        button_border_width="1px",
        button_large_text_size="*text_md",
        button_large_padding="8px 14px",
        button_primary_background_fill=ACCENT,
        button_primary_background_fill_dark=ACCENT,
        button_primary_background_fill_hover=ACCENT_DARK,
        button_primary_background_fill_hover_dark=ACCENT_DARK,
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_900",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
    )


def looks(limits: Limits) -> dict:
    """What Gradio needs to know of the looks, and what it must not add of its own."""
    return {
        "theme": theme(),
        "css_paths": [HERE / "style.css"],
        "favicon_path": HERE / "logo.svg",
        "footer_links": ["api"],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "max_file_size": limits.file_bytes,
    }
