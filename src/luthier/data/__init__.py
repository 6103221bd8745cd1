"""From files of rows to packed batches: records -> conversations -> tokens with a label mask -> batches.

sources.py       a file          -> records, each with its file and line
formats.py       a record        -> a conversation (one small function per format, one table)
tokenizer.py     text            -> ids; what a row says never becomes a special token
jinja_chat.py    a chat template -> text, in jinja's sandbox
text_template.py `alpaca` and a text with {fields} -> a chat template
render.py        a conversation  -> text with the spans that are trained
labels.py        text with spans -> ids and labels
split.py         content         -> train, eval or test, by a stable hash
prepare.py       a recipe        -> a dataset and its report
batches.py       examples        -> the packed micro-batches of any step
"""
