"""Ray Data and Ray Train around `mtc`: functions that take a configuration and return a data set, a result or a run.

What a driver calls: `pipeline` (the whole job), `reporting` (the analysis again), `tokenise`, `training`, `held_out`,
`probing`, and what they plan with: `resources`, `placement`, `places`, `gpus`, `mps`, `local_ray`, `progress`,
`job_metrics`. What runs elsewhere: `train_worker` with `data_state`, `batches`, `routing` and `accounts` in the
trainers, `capture` on the model actors, `activations`, `stream` and `resume` in Ray's own processes, which do without
torch. They meet in `blocks` (what travels) and `outcome` (what training comes to). Nothing is imported here, so that
each process loads what it needs.
"""
