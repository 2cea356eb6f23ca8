"""`bov probe`: which layers of a model that somebody has need context in their values.

    settings     how much text, which layers, how exact
    rows         texts -> rows of tokens, in parts that share no text
    places       where a model's values come to be, whatever its make
    calibration  tables of values by token id
    measuring    what is lost with tables; the order in which layers go
    state        what is found so far, so that a probe that is killed goes on
    result       what is found, as dataclasses
    probing      all of it, for one model: `bov_lightning.probe`
    content      the same as a report's tables and plots
    command      `bov probe`

Not `evaluation.probe`, which finds out how a model can be scored.
"""
