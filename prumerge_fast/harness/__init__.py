"""A model on questions: loading, prompts, inputs, stage times, answers, provenance."""
