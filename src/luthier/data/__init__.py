"""From files of rows to packed batches. Each step below takes what the one above it gives.

read      sources.py opens what a recipe names (folders.py, hub.py, readers*.py, packed.py) and recognises its rows'
          format (recognise.py); formats.py and turns.py make each a `Conversation`, or a `BadRow` (problems.py)
write     render.py: a conversation as text with the spans that are trained, by the template that the recipe names
          (templates.py, text_template.py, jinja_*.py)
tokenise  labels.py: text with spans to ids and labels; tokenizer.py: what a row says never becomes a special token
keep      build.py does these three in chunks, into the store on disk (store.py, cache.py); duplicates.py finds what
          says the same
use       prepare.py: a recipe to a `Dataset` (dataset.py) and its report (report.py), with sides (split.py) and limits
          (length.py)
batch     epochs.py and packing.py: which rows stand together in which step; batches.py: the tensors

Beside them, for people: audit/ finds what is wrong with data (`luthier data check`), and view*.py shows it as the model
will see it (`luthier data show`).
"""
