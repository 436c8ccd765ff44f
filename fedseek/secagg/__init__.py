"""Secure aggregation, the inner lock: masks that vanish in the sum, and only in the sum.

Read in this order:

- ``stream``: a seed of 16 bytes becomes as many slots as an update has; every mask is one of these.
- ``shamir``: a seed becomes shares, so that the seeds of sites that drop out can be rebuilt.
- ``graph``: who masks with whom, who holds whose shares, how many shares open a seed.
- ``mac``: two numbers by which sites see that a sum was not altered on the way.

Theory only: nothing here knows a message, a site's name or a key of the roster.
"""
