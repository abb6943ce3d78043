"""Names of a checkpoint's files."""

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
# All files that a processor may have. They are copied in this order: without the last, a folder is incomplete.
PROCESSOR_FILES = (
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "merges.txt",
    "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "vocab.json", "tokenizer.json",
)  # fmt: skip
