"""Who is who: identities, the roster, signatures, and sealing a secret to one site.

Read in this order:

- ``roster``: the public half of every site, in one canonical, digestible list.
- ``keys``: the private half of one site.
- ``signing``: who said this, for which purpose.
- ``sealing``: handing the group key to one site through a courier that must not read it.
- ``vault``: keeping private keys and other secrets on a disk.

All primitives come from ``cryptography``; what is decided here is only what each of them binds. A process that needs
no private key (the coordinator) imports ``roster`` and ``signing`` and never loads ``keys`` or ``vault``.
"""
