"""The largest budget that a tolerance bears: `light: auto`, found when estimation is over.

`curve`: what cuts cost before anything trains. `probes`: what is left of that when copies have trained a little.
`search`: which budgets to probe, and the one that is found, as pure functions. `cost` and `room`: what a search takes
of a run, and how large it may be. `worth` and `tolerance`: points, nats, and words for them. `finding` is all of it on
a model, `trainer` on the model of a trainer, and `found` what comes out.
"""
