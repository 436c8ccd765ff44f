"""Reads ``round.json`` back, for ``reader.py``: every signature, box, share, seed, mask and sum of one round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from plain import (
    Refusal,
    agree,
    combine,
    expect,
    expect_case,
    flat,
    graph_shape,
    hkdf,
    join,
    mask_private_key,
    public_of,
    read_roster,
    require,
    roster_digest,
    round_graph,
    sha256,
    stream,
    tags,
    verify,
)
from wire import BadBytes, pack, unpack


class Round:
    """The public part of ``round.json``, and the formulas over it."""

    def __init__(self, document: dict[str, Any]) -> None:
        roster = bytes.fromhex(document["roster"])
        self.run: str = document["run"]
        self.number: int = document["round"]
        self.epoch: int = document["epoch"]
        self.adapter = bytes.fromhex(document["adapter"])
        self.modulus: int = document["modulus"]
        self.entries = {entry["name"]: entry for entry in read_roster(roster)}
        self.names = list(self.entries)
        self.plan = json.loads(document["plan"])
        self.digest = sha256(b"fedseek/plan/v1\0" + document["plan"].encode()).hex()
        self.bound = join(self.run.encode(), self.digest.encode(), roster_digest(roster))
        cohort = self.plan["cohort"]
        self.floor: int = cohort["min_contributors"]
        self.shape = graph_shape(len(self.names), cohort["colluders"], str(cohort["dropout_fraction"]))
        positions = list(range(len(self.names)))
        found = round_graph(self.bound, self.number, positions, self.shape)
        self.neighbours = {
            name: [self.names[near] for near in around] for name, around in zip(self.names, found, strict=True)
        }
        self.threshold = self.shape["threshold"]
        self.min_survivors = max(self.shape["min_survivors"], cohort["min_sites"])

    def bind(self, *fields: bytes) -> bytes:
        return self.bound + join(self.number.to_bytes(4, "big"), *fields)

    def holders(self, dealer: str) -> list[str]:
        return [name for name in self.names if name == dealer or name in self.neighbours[dealer]]

    def members(self, scope: str) -> list[str]:
        return [name for name, each in self.entries.items() if scope in ("global", f"kind/{each['kind']}")]

    def scopes_of(self, name: str) -> list[str]:
        scopes = ["global", f"kind/{self.entries[name]['kind']}"]
        return [scope for scope in scopes if len(self.members(scope)) >= self.floor]

    def kin(self, name: str) -> list[str]:
        """Whom a site masks its head with."""
        head = f"kind/{self.entries[name]['kind']}"
        return [other for other in self.members(head) if other != name] if head in self.scopes_of(name) else []

    def open_scopes(self, survivors: list[str]) -> dict[str, list[str]]:
        """The adapter over the survivors; a head where nobody of its kind vanished."""
        heads = sorted({scope for name in self.names for scope in self.scopes_of(name)} - {"global"})
        whole = {scope: self.members(scope) for scope in heads if set(self.members(scope)) <= set(survivors)}
        return {"global": survivors, **whole}

    def participants(self, names: list[str]) -> bytes:
        positions = b"".join(self.names.index(name).to_bytes(2, "big") for name in sorted(names, key=self.names.index))
        return join(b"fedseek/participants/v1", self.bind(positions))

    def verify(self, site: str, context: str, message: bytes, signature: str) -> None:
        require(site in self.entries, "WrongKey")
        verify(self.entries[site]["signing_key"], context.encode(), message, bytes.fromhex(signature))

    def check_keys(self, keys: dict[str, Any], wanted: int) -> None:
        require(keys["round"] == wanted, "WrongRound")
        fields = (keys["site"].encode(), bytes.fromhex(keys["mask_key"]), bytes.fromhex(keys["share_key"]))
        message = self.bound + join(wanted.to_bytes(4, "big"), *fields)
        self.verify(keys["site"], "fedseek/round-keys/v1", message, keys["signature"])
        for public_key in fields[1:]:
            agree(bytes(32), public_key)  # whatever the private key: a point of low order agrees with none

    def check_dealt(self, dealer: str, dealt: dict[str, Any]) -> None:
        require(dealt["round"] == self.number, "WrongRound")
        fields = [dealer.encode()]
        for holder in sorted(dealt["share_digests"]):
            fields += [holder.encode(), sha256(bytes.fromhex(dealt["boxes"].get(holder, "")))]
            fields += flat(dealt["share_digests"][holder])
        fields += flat(dealt["secret_digests"])
        self.verify(dealer, "fedseek/shares-dealt/v1", self.bind(*fields), dealt["signature"])
        require(set(dealt["boxes"]) == set(self.neighbours[dealer]), "Malformed")
        require(set(dealt["share_digests"]) == set(self.holders(dealer)), "Malformed")
        for digests in (dealt["secret_digests"], *dealt["share_digests"].values()):
            require(set(digests) == {"mask-key", "self-mask"}, "Malformed")

    def pair_seed(self, private_key: bytes, me: str, keys: dict[str, Any]) -> bytes:
        one, other = sorted((me.encode(), keys["site"].encode()))
        shared = agree(private_key, bytes.fromhex(keys["mask_key"]))
        return hkdf(shared, join(b"fedseek/pairwise-mask/v1", self.bind(one, other)), 16)

    def head_seed(self, share_key: bytes, me: str, keys: dict[str, Any]) -> bytes:
        one, other = sorted((me.encode(), keys["site"].encode()))
        shared = agree(share_key, bytes.fromhex(keys["share_key"]))
        return hkdf(shared, join(b"fedseek/head-mask/v1", self.bind(one, other)), 16)

    def presence(self) -> bytes:
        everybody = self.participants(self.names)  # on the key list, and masking
        fields = (everybody, everybody, self.epoch.to_bytes(4, "big"), self.adapter)
        return join(b"fedseek/presence/v1", *fields)

    def open_box(self, box: bytes, share_key: bytes, dealer: dict[str, Any], receiver: str) -> dict[str, bytes]:
        bound = join(b"fedseek/share-box/v1", self.bind(dealer["site"].encode(), receiver.encode()))
        key = hkdf(agree(share_key, bytes.fromhex(dealer["share_key"])), bound, 32)
        try:
            content = AESGCM(key).decrypt(box[:12], box[12:], bound)
        except (InvalidTag, ValueError):
            raise Refusal("WrongKey") from None
        try:
            held = unpack(content)
        except BadBytes:
            raise Refusal("Malformed") from None
        require(isinstance(held, dict) and set(held) == {"shares"}, "Malformed")
        wanted = {"mask-key", "self-mask"}
        require(set(held["shares"]) == wanted and {len(each) for each in held["shares"].values()} == {16}, "Malformed")
        return dict(held["shares"])

    def share_digest(self, dealer: str, holder: str, secret: str, share: bytes) -> str:
        fields = (dealer.encode(), holder.encode(), secret.encode(), share)
        return sha256(join(b"fedseek/share-digest/v1", self.bind(*fields))).hex()

    def secret_digest(self, dealer: str, secret: str, seed: bytes) -> str:
        return sha256(join(b"fedseek/secret-digest/v1", self.bind(dealer.encode(), secret.encode(), seed))).hex()

    def check_revealed(self, revealed: dict[str, Any], survivors: list[str]) -> None:
        fields = [self.participants(self.names), self.participants(survivors)]
        for dealer in sorted(revealed["self_masks"]):
            fields += [b"self", dealer.encode(), bytes.fromhex(revealed["self_masks"][dealer])]
        for dealer in sorted(revealed["mask_keys"]):
            fields += [b"mask", dealer.encode(), bytes.fromhex(revealed["mask_keys"][dealer])]
        site = revealed["site"]
        self.verify(site, "fedseek/shares-revealed/v1", self.bind(*fields), revealed["signature"])
        around = set(self.holders(site))
        require(set(revealed["self_masks"]) == around & set(survivors), "Malformed")
        require(set(revealed["mask_keys"]) == around - set(survivors), "Malformed")

    def add(self, total: list[int], seed: bytes, purpose: str, sign: int) -> list[int]:
        mask = stream(seed, purpose.encode(), len(total), self.modulus)
        return [(slot + sign * each) % self.modulus for slot, each in zip(total, mask, strict=True)]

    def sign_of(self, carrier: str, peer: str) -> int:
        """+1 where the peer comes after the carrier on the roster."""
        return 1 if self.names.index(carrier) < self.names.index(peer) else -1


def check_round(document: dict[str, Any]) -> int:
    played = Round(document)
    check_header(document, played)
    tag_keys = check_tag_keys(document, played)
    sites = {site["name"]: site for site in document["sites"]}
    expect("sites", list(sites), played.names)
    for site in sites.values():
        check_site(site, sites, played, tag_keys)
    for pair in document["pairs"]:
        check_pair(pair, sites, played)
    for pair in document["heads"]:
        check_head(pair, sites, played)
    for graph in document["graphs"]:
        check_round_graph(graph, played.number)
    for ending in document["endings"]:
        check_ending(ending, sites, played, tag_keys)
    for signed in document["signed"]:
        check_signed(signed, played)
    for case in document["refused"]:
        check_refused(case, sites, played)
    return sum(len(value) for value in document.values() if isinstance(value, list))


def check_header(document: dict[str, Any], played: Round) -> None:
    canonical = json.dumps(played.plan, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    expect("plan, canonical form", canonical, document["plan"])
    expect("plan digest", played.digest, document["plan_digest"])
    expect("roster digest", roster_digest(bytes.fromhex(document["roster"])).hex(), document["roster_digest"])
    expect("bound", played.bound.hex(), document["bound"])
    expect("threshold", played.threshold, document["threshold"])
    expect("least survivors", played.min_survivors, document["min_survivors"])
    expect("the modulus has slots", played.modulus % 8192, 1)
    for name, entry in played.entries.items():
        digest = sha256(b"fedseek/roster-entry/v1" + pack(entry)).hex()
        groups = "-".join(digest[at : at + 8] for at in range(0, 64, 8))
        expect(f"fingerprint of {name}", groups, document["fingerprints"][name])
    expect("fingerprints", set(document["fingerprints"]), set(played.entries))


def check_tag_keys(document: dict[str, Any], played: Round) -> dict[str, bytes]:
    """HKDF over the parameters' name and the 4096 coefficients of the group key, 8 bytes each, little-endian."""
    modulus = document["coefficient_modulus"]
    drawn = stream(bytes.fromhex(document["group_key_seed"]), b"coefficients", 4096, modulus)
    content = f"4096,(58,),{played.modulus}\0".encode() + b"".join(each.to_bytes(8, "little") for each in drawn)
    keys = {}
    for case in document["tag_keys"]:
        info = b"fedseek/tag/v1" + played.bind(case["name"].encode())
        keys[case["name"]] = hkdf(content, info, 32, salt=b"fedseek/he/derive/v1")
        expect(f"tag key of {case['name']}", keys[case["name"]].hex(), case["key"])
    return keys


def check_site(site: dict[str, Any], sites: dict[str, Any], played: Round, tag_keys: dict[str, bytes]) -> None:
    name = site["name"]
    check_identity(site, played.entries[name])
    mask_key = mask_private_key(bytes.fromhex(site["mask_seed"]))
    share_key = bytes.fromhex(site["share_key"])
    expect(f"{name}, private mask key", mask_key.hex(), site["mask_private_key"])
    expect(f"{name}, mask key", public_of(mask_key), site["keys"]["mask_key"])
    expect(f"{name}, share key", public_of(share_key), site["keys"]["share_key"])
    expect(f"{name}, site of its keys", site["keys"]["site"], name)
    expect(f"{name}, neighbours", played.neighbours[name], site["neighbours"])
    expect(f"{name}, kin", played.kin(name), site["kin"])
    expect(f"{name}, scopes", [played.scopes_of(name)] * 2, [[*site["tagged"]], [*site["masked"]]])
    played.check_keys(site["keys"], played.number)
    played.check_dealt(name, site["dealt"])
    check_shares(site, sites, played)
    for scope, slots in site["tagged"].items():
        expect(f"{name}, tags of {scope}", tags(slots, tag_keys[scope], [name], played.modulus), slots[:2])
        total = slots
        if scope == "global":
            total = played.add(slots, bytes.fromhex(site["self_seed"]), "self", 1)
            seeds = {peer: played.pair_seed(mask_key, name, sites[peer]["keys"]) for peer in played.neighbours[name]}
        else:
            seeds = {peer: played.head_seed(share_key, name, sites[peer]["keys"]) for peer in played.kin(name)}
        for peer, seed in seeds.items():
            total = played.add(total, seed, "pair", played.sign_of(name, peer))
        expect(f"{name}, masked {scope}", total, site["masked"][scope])


def check_identity(site: dict[str, Any], entry: dict[str, Any]) -> None:
    """The private keys belong to the public ones of the roster."""
    identity = unpack(bytes.fromhex(site["identity"]))
    expect(f"{site['name']}, identity", pack(identity).hex(), site["identity"])
    expect("identity, version", identity["version"], 1)
    expect("identity, name and kind", (identity["name"], identity["kind"]), (site["name"], site["kind"]))
    expect("kind on the roster", entry["kind"], site["kind"])
    signing = Ed25519PrivateKey.from_private_bytes(identity["signing_key"]).public_key().public_bytes_raw()
    expect(f"{site['name']}, signing key", signing, entry["signing_key"])
    mlkem = MLKEM768PrivateKey.from_seed_bytes(identity["mlkem_seed"]).public_key().public_bytes_raw()
    sealing = mlkem + bytes.fromhex(public_of(identity["x25519_key"]))
    expect(f"{site['name']}, sealing key", sealing, entry["sealing_key"])


def check_shares(site: dict[str, Any], sites: dict[str, Any], played: Round) -> None:
    """Every box opens at its holder; shares fit their digests; any threshold of them make the secret."""
    dealer, dealt = site["name"], site["dealt"]
    secrets = {"mask-key": site["mask_seed"], "self-mask": site["self_seed"]}
    shares: dict[str, dict[int, bytes]] = {secret: {} for secret in secrets}
    for place, holder in enumerate(played.holders(dealer)):
        if holder == dealer:
            held = {secret: bytes.fromhex(share) for secret, share in site["own_shares"].items()}
        else:
            box, key = bytes.fromhex(dealt["boxes"][holder]), bytes.fromhex(sites[holder]["share_key"])
            held = played.open_box(box, key, site["keys"], holder)
        expect(f"{dealer}, secrets of {holder}", set(held), set(secrets))
        for secret, share in held.items():
            digest = played.share_digest(dealer, holder, secret, share)
            expect(f"{dealer}, digest for {holder}", digest, dealt["share_digests"][holder][secret])
            shares[secret][place] = share
    for secret, seed in secrets.items():
        digest = played.secret_digest(dealer, secret, bytes.fromhex(seed))
        expect(f"{dealer}, digest of {secret}", digest, dealt["secret_digests"][secret])
        for left, right in pairwise(sorted(shares[secret])):
            some = {place: shares[secret][place] for place in (left, right)}
            expect(f"{dealer}, shares of {secret}", combine(some, played.threshold).hex(), seed)


def check_pair(pair: dict[str, Any], sites: dict[str, Any], played: Round) -> None:
    """Either site gets the same seed."""
    for me, peer in (pair["sites"], pair["sites"][::-1]):
        private_key = mask_private_key(bytes.fromhex(sites[me]["mask_seed"]))
        expect(pair["name"], played.pair_seed(private_key, me, sites[peer]["keys"]).hex(), pair["seed"])


def check_head(pair: dict[str, Any], sites: dict[str, Any], played: Round) -> None:
    for me, peer in (pair["sites"], pair["sites"][::-1]):
        share_key = bytes.fromhex(sites[me]["share_key"])
        expect(pair["name"], played.head_seed(share_key, me, sites[peer]["keys"]).hex(), pair["seed"])


def check_round_graph(graph: dict[str, Any], number: int) -> None:
    shape = graph_shape(len(graph["listed"]), graph["colluders"], graph["dropout"])
    expect(f"{graph['name']}, threshold", shape["threshold"], graph["threshold"])
    found = round_graph(bytes.fromhex(graph["bound"]), number, graph["listed"], shape)
    expect(f"{graph['name']}, neighbours", found, graph["neighbours"])


def check_ending(ending: dict[str, Any], sites: dict[str, Any], played: Round, tag_keys: dict[str, bytes]) -> None:
    survivors = ending["survivors"]
    gone = [name for name in played.names if name not in survivors]
    for name in survivors:
        played.verify(name, "fedseek/round-participants/v1", played.presence(), ending["presence"][name])
    expect(f"{ending['name']}, presence", set(ending["presence"]), set(survivors))
    expect(f"{ending['name']}, who revealed", [each["site"] for each in ending["revealed"]], survivors)
    shares: dict[tuple[str, str], dict[int, bytes]] = {}
    for revealed in ending["revealed"]:
        told = (revealed["type"], revealed["version"], revealed["run"], revealed["round"])
        expect("revealed, about the message", told, ("SharesRevealed", 1, played.run, played.number))
        played.check_revealed(revealed, survivors)
        for dealer, secret, share in given(revealed):
            place = played.holders(dealer).index(revealed["site"])
            shares.setdefault((dealer, secret), {})[place] = share
    seeds = {which: combine(found, played.threshold) for which, found in shares.items()}
    for (dealer, secret), seed in seeds.items():
        digest = sites[dealer]["dealt"]["secret_digests"][secret]
        expect(f"{ending['name']}, {secret} of {dealer}", played.secret_digest(dealer, secret, seed), digest)
    scopes = played.open_scopes(survivors)
    expect(f"{ending['name']}, scopes", (set(ending["mask"]), set(ending["sum"])), (set(scopes), set(scopes)))
    for scope, members in scopes.items():
        check_sum(ending, scope, members, gone, seeds, sites, played)
        got = ending["sum"][scope]
        expect(f"{ending['name']}, tags of the sum", tags(got, tag_keys[scope], members, played.modulus), got[:2])


def given(revealed: dict[str, Any]) -> Iterator[tuple[str, str, bytes]]:
    yield from ((dealer, "self-mask", bytes.fromhex(share)) for dealer, share in revealed["self_masks"].items())
    yield from ((dealer, "mask-key", bytes.fromhex(share)) for dealer, share in revealed["mask_keys"].items())


def check_sum(
    ending: dict[str, Any],
    scope: str,
    members: list[str],
    gone: list[str],
    seeds: dict[tuple[str, str], bytes],
    sites: dict[str, Any],
    played: Round,
) -> None:
    """The total mask from rebuilt seeds, and what is left of the sum of masked slots."""
    total = [0] * len(ending["mask"][scope])
    for name in members if scope == "global" else ():  # a head that is open carries no mask: all of its kind are there
        total = played.add(total, seeds[name, "self-mask"], "self", 1)
        for missing in gone:
            if missing in played.neighbours[name]:
                private_key = mask_private_key(seeds[missing, "mask-key"])
                seed = played.pair_seed(private_key, missing, sites[name]["keys"])
                total = played.add(total, seed, "pair", played.sign_of(name, missing))
    expect(f"{ending['name']}, mask of {scope}", total, ending["mask"][scope])
    masked = [sum(each) for each in zip(*(sites[name]["masked"][scope] for name in members), strict=True)]
    left = [(slot - mask) % played.modulus for slot, mask in zip(masked, total, strict=True)]
    expect(f"{ending['name']}, sum of {scope}", left, ending["sum"][scope])
    tagged = [sum(each) % played.modulus for each in zip(*(sites[n]["tagged"][scope] for n in members), strict=True)]
    expect(f"{ending['name']}, sum of the updates", left, tagged)


def check_signed(signed: dict[str, Any], played: Round) -> None:
    run, digests = played.run, flat(signed.get("digests", {}))
    context, message = {
        "plan": ("fedseek/plan-admitted/v1", played.bound + join()),
        "digests": ("fedseek/adapter-digest/v1", join(run.encode(), played.number.to_bytes(4, "big"), *digests)),
        "release": ("fedseek/release-approved/v1", join(run.encode(), signed.get("statement", "").encode(), *digests)),
    }[signed["name"]]
    played.verify(signed["site"], context, message, signed["signature"])


def check_refused(case: dict[str, Any], sites: dict[str, Any], played: Round) -> None:
    def attempt() -> dict[str, Any]:
        match case["what"]:
            case "keys":
                played.check_keys(case["keys"], case["wanted"])
            case "pair":
                private_key = mask_private_key(bytes.fromhex(sites[case["site"]]["mask_seed"]))
                played.pair_seed(private_key, case["site"], case["keys"])
            case "dealt":
                played.check_dealt(case["dealer"], case["dealt"])
            case "box":
                key = bytes.fromhex(sites[case["receiver"]]["share_key"])
                dealer = sites[case["dealer"]]["keys"]
                played.open_box(bytes.fromhex(case["box"]), key, dealer, case["receiver"])
            case "revealed":
                played.check_revealed(case["revealed"], case["survivors"])
            case "presence":
                played.verify(case["site"], "fedseek/round-participants/v1", played.presence(), case["signature"])
        return {}

    expect_case(case, attempt)
