"""One file per question. A space file has

    QUESTION             the question, in a sentence
    CONTROL              the label of the arm that the others are compared with
    arms()               {label: {dotted setting: value}}: the grid, control included
    suggest(trial)       the same question for a searcher: an Optuna define-by-run function from a trial to dotted settings

and nothing else. `medssl sweep NAME` opens `search_spaces/NAME.py`; `medssl sweep ./mine.py` opens your own.
"""
