"""Names of the languages, as the prompts call them."""

NAMES = {
    "de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "sv": "Swedish",
    "uk": "Ukrainian",
}  # fmt: skip
