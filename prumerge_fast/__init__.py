"""LLaVA-PruMerge for any LLaVA: `prumerge_fast.patch(model)`."""
