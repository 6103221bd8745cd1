"""What stands between a file from elsewhere and the libraries that read it. No torch here.

    files.py       a file is a plain one, of a bounded size
    header.py      a safetensors file's header, checked before any library sees the file
    inside.py      a name in an index stays in its folder
    documents.py   JSON of a bounded size and depth, no key twice
    tokenizer.py   a tokenizer.json that neither runs away nor takes the process down
    wrong.py       how they say what is wrong
    secrets.py     tokens and control characters taken out of what is shown or written

All raise FileError and nothing else. SECURITY.md says against whom.
"""
