"""The operator's page: what a deployment does, and what people say of it (docs/page.md)."""
