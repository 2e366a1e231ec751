"""One file per question. A space file has

    QUESTION             the question, in a sentence
    CONTROL              the label of the arm that the others are compared with
    arms()               {label: {dotted setting: value}}: the grid, control included; null in an arm switches off what
                         a command line may set for the others
    suggest(trial)       the same question for a searcher: an Optuna define-by-run function from a trial to dotted settings

where its question asks for it

    COMPARE              {label: label}: arms with a control of their own (an arm that is its own is a control)
    DEFAULTS             {dotted setting: value} under what is typed
    NEEDS                dotted settings that only the command line can give

and nothing else. `medssl sweep NAME` opens `search_spaces/NAME.py`; `medssl sweep ./mine.py` opens your own.
"""
