"""The small world that the bundled base model `sprig` knows: facts, stories and instructions in plain English.

tables   what is so (plain data: "subject = fact" rows)
facts    rows -> `Fact`: questions in several wordings, the answer sentence, its key words, other statements of it
stories  the plain short stories of the pretraining text
text     the pretraining documents: conversations, statements, stories, instructions
pirate   plain answer -> the same answer in pirate speech
tales    title -> short tale in an older voice than the stories'
datasets the bundled rows (pirate, tales) made from all this

Everything is a function of a seed, so whatever is measured on sprig can be measured exactly.
"""
