"""A trained model in the forms that servers load. The forms by name, here because a wrong one is refused before torch is loaded."""

GGUF = ("gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0")
FORMS = ("bnb-4bit", *GGUF)
