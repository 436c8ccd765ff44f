"""Who is who: identities, the roster, signatures, and sealing a secret to one site.

Read in this order:

- ``roster``: the public half of every site, in one canonical, digestible list.
- ``keys``: the private half of one site.
- ``signing``: who said this, for which purpose.
- ``sealing``: handing the group key to one site through a courier that must not read it.
- ``words``: a fingerprint that people can read to each other.
- ``signed_roster``: the roster with a number, signed by the authority that people compared once.
- ``enrolment``: how a site gets onto it, and renews its keys.
- ``authority``: the keys that sign rosters and TLS certificates.
- ``vault``: keeping private keys and other secrets on a disk.

All primitives come from ``cryptography``; what is decided here is only what each of them binds. A process that needs
no private key (the coordinator) never loads ``keys`` or ``vault``.
"""
