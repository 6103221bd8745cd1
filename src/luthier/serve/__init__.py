"""An OpenAI-compatible server over the engine: any client of that interface talks to a tuned model.

    HTTP -> access (key, host, body) -> schema -> prepare -> scheduler (one thread) -> answers, streaming

What the server answers is what `luthier generate` answers: it adds no mathematics of its own.
"""
