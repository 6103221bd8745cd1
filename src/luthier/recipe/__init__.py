"""What the user asks for: one YAML file, checked whole, as one frozen value.

schema.py   every setting once: type, unit, bounds, default, help
rules.py    what holds between settings
document.py YAML text -> plain values, and the line each of them stands on
load.py     file + `--set` -> Recipe, or every problem at once
init.py     the commented recipe of `luthier init`, and the presets
"""
