"""The network of a sandbox, on the host: all that leaves passes here.

In reading order: `gateway` (the guest's port) hands DNS to `nameserver` and each connection to
`connection`, which finds out what it speaks; `judge` decides about each request and `relay` carries
it, through `upstream`, which dials.
"""
