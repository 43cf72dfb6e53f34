"""`light: auto`: a search, after estimation, for the largest budget within a tolerance.

`curve` measures the rise of the loss right after cuts of several sizes. `probes` measures it again on copies that have
trained for a few steps. `search` chooses the budgets to probe and the result, as pure functions. `cost` counts the
computation of a search, and `room` sets its size. `worth` and `tolerance` convert between points and nats. `finding`
searches for a model, `trainer` for the model of a trainer, and `found` holds the result.
"""
