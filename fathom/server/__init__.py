"""HTTP: the engine behind the OpenAI and Anthropic dialects, with a page to try it."""
