"""FedSeek, the library: what sites and coordinator compute. No network, no scheduling, no Flower.

Read a round by opening the files in this order:

    plan -> records -> train -> encode -> encrypt -> messages -> aggregate -> decrypt -> evaluate -> release

``lora``, ``dp``, ``he`` and ``identity`` hold the theory; each can be reviewed alone.
"""
