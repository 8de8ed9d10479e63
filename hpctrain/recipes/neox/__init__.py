"""The rules of the recipe `neox-sft`, lowest first: keys, draft, batch, model, data, saving,
launch, configs.

Facts about NeoX name the file and line they were read at: EleutherAI/gpt-neox@ea7aefd ("NeoX"),
tilde-nlp/llm-gpt-neox@374a5c6 ("fork") and EleutherAI/DeeperSpeed v0.16.5 ("DS").
"""
