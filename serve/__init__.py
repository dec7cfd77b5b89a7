"""The HTTP service of finished runs.

Each package imports only those before it, from their `__init__`:
`contract` (what is passed, counted and set) <- `service` (runs, tokens, features, batches; no HTTP, no Ray) <- `http`
(routes, formats, access) <- `deployments` (Ray Serve) <- `app` (the application and its command line).
"""
