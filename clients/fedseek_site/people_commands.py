"""Commands of ``fedseek-site`` for the site's people: look at plans and releases, approve them, pause, check the policy.

They ask the daemon over the socket of a role (``fedseek_site.local_api``). A private key is read where the command runs
and never sent: what goes to the daemon is a signature.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from fedseek.daemon.asking import json_option
from fedseek.errors import Malformed

if TYPE_CHECKING:  # commands import what they need: a help page should not wait for the accountant
    from fedseek.identity.roster import Roster
    from fedseek.plan import Plan
    from fedseek_site.local_releases import ReleaseShown

PASSPHRASE_VARIABLE = "FEDSEEK_PERSON_PASSPHRASE"  # noqa: S105 -- its name, not a secret

folder_option = click.option(  # people may pass through the folder to its sockets, and not look around in it
    "--folder",
    type=click.Path(path_type=Path, readable=False),
    default=Path("site"),
    show_default=True,
    help="The site's folder.",
)
language_option = click.option(
    "--language", type=click.Choice(["en", "zh"]), default="en", show_default=True, help="Of a privacy statement."
)


@click.command(epilog="Example: fedseek-site status --folder /var/lib/fedseek/site --json")
@folder_option
@json_option
def status(folder: Path, as_json: bool) -> None:
    """Whether this site takes part now, and if not, why."""
    _show(ask_daemon(folder, "status"), as_json)


@click.command(epilog="Example: fedseek-site plans")
@folder_option
@json_option
@click.argument("digest", required=False)
def plans(folder: Path, as_json: bool, digest: str | None) -> None:
    """The plans announced to this site; with the first 12 digits of a DIGEST, that one in plain words."""
    if digest is not None:
        _show_plan(folder, digest, as_json)
        return
    told = ask_daemon(folder, "plans")
    if as_json:
        click.echo(json.dumps(told, ensure_ascii=False))
        return
    for line in told["plans"] or ():
        click.echo(f"{line['digest'][:16]}  {line['name']}  {line['num_sites']} sites  {_stands(line)}")
    if not told["plans"]:
        click.echo("no plan was announced to this site")


@click.command(epilog="Example: fedseek-site releases")
@folder_option
@json_option
@language_option
@click.argument("digest", required=False)
def releases(folder: Path, as_json: bool, language: str, digest: str | None) -> None:
    """What this site would sign or has signed; with the first 12 digits of a DIGEST, that privacy statement in words."""
    if digest is not None:
        if (shown := _release(folder, digest)) is None:
            raise click.UsageError(f"no release drafted here begins with {digest!r}")
        _show_release(shown, language, as_json=as_json)
        return
    told = ask_daemon(folder, "releases")
    if as_json:
        click.echo(json.dumps(told, ensure_ascii=False))
        return
    for line in told["releases"]:
        click.echo(f"{line['digest'][:16]}  run {line['run']}  {_stands(line)}")
    if not told["releases"]:
        click.echo("this site has drafted no release")


@click.command(epilog='Example: fedseek-site approve 3f2a9c01b7de --person "张伟" --key officer.pem')
@folder_option
@json_option
@language_option
@click.argument("digest")
@click.option("--person", required=True, help="Your name, as in the policy.")
@click.option("--key", "key_file", type=click.Path(path_type=Path), required=True, help="Your key file.")
@click.option("--yes", is_flag=True, help="Do not ask whether you have read it.")
def approve(folder: Path, as_json: bool, language: str, digest: str, person: str, key_file: Path, yes: bool) -> None:
    """Approve the plan or the release whose DIGEST begins so: see it in plain words, then sign it.

    For a privacy officer. Of a release the words are the privacy statement that this site would sign. The passphrase of
    the key is asked for, or taken from FEDSEEK_PERSON_PASSPHRASE.
    """
    from fedseek_site.people import sign_approval
    from fedseek_site.plan_words import describe

    if (release := _release(folder, digest)) is not None:
        _show_release(release, language, err=as_json)
        _approve_release(folder, release, person, key_file, yes=yes, as_json=as_json)
        return
    shown, plan, roster = _plan(folder, digest)
    for word, text in describe(plan, roster):
        click.echo(f"{word + ':':<20}{text}", err=as_json)
    if not yes:
        click.confirm(
            f"Do you approve this plan for {shown.site}, among these {len(roster.entries)} sites?",
            abort=True,
            err=as_json,
        )
    signed = sign_approval(
        _person_key(key_file), plan.digest, roster.digest().hex(), site=shown.site, person=person, at=int(time.time())
    )
    _show(ask_daemon(folder, "approve", signed), as_json)


@click.command(epilog='Example: fedseek-site withdraw 3f2a9c01b7de --person "张伟"')
@folder_option
@json_option
@click.argument("digest")
@click.option("--person", required=True, help="Whose approval, as in the policy.")
def withdraw(folder: Path, as_json: bool, digest: str, person: str) -> None:
    """Take back an approval of the plan or release whose DIGEST begins so. For a privacy officer.

    A run of the plan is put off. Of a release it can be taken back until enough people have approved.
    """
    from fedseek_site.local_api import ReleaseWithdrawal, Withdrawal

    if (release := _release(folder, digest)) is not None:
        asked = ReleaseWithdrawal(release=release.digest, person=person)
        _show(ask_daemon(folder, "withdraw_release", asked), as_json)
        return
    _, plan, _ = _plan(folder, digest)
    _show(ask_daemon(folder, "withdraw", Withdrawal(plan=plan.digest, person=person)), as_json)


@click.command("accept-record", epilog='Example: fedseek-site accept-record coordinator --why "disk lost on 3 May"')
@folder_option
@json_option
@click.argument("name")
@click.option("--why", required=True, help="Goes into this site's own record.")
def accept_record(folder: Path, as_json: bool, name: str, why: str) -> None:
    """Let the audit record of NAME begin anew: a site's, or the coordinator's. For a privacy officer.

    Until then it is refused as a contradiction. Ask its owner first, over another channel, what became of the old one.
    """
    from fedseek_site.local_api import RecordAccepted

    _show(ask_daemon(folder, "accept_record", RecordAccepted(name=name, why=why)), as_json)


@click.command(epilog="Example: fedseek-site pause")
@folder_option
@json_option
def pause(folder: Path, as_json: bool) -> None:
    """Take part in nothing new until `resume`, also after a restart. For an operator."""
    _show(ask_daemon(folder, "pause"), as_json)


@click.command(epilog="Example: fedseek-site resume")
@folder_option
@json_option
def resume(folder: Path, as_json: bool) -> None:
    """Take part again. For an operator."""
    _show(ask_daemon(folder, "resume"), as_json)


@click.command(epilog="Example: fedseek-site data --reload")
@folder_option
@json_option
@click.option("--reload", is_flag=True, help="Read the files again first.")
def data(folder: Path, as_json: bool, reload: bool) -> None:
    """The data set: name, counts, fingerprint. For a data steward."""
    _show(ask_daemon(folder, "reload_data", timeout=3600.0) if reload else ask_daemon(folder, "data"), as_json)


@click.command(epilog='Example: fedseek-site person "张伟" --role "privacy officer" --key officer.pem')
@click.argument("name")
@click.option("--key", "key_file", type=click.Path(path_type=Path), required=True, help="New file for the private key.")
@click.option(
    "--role",
    type=click.Choice(["privacy officer", "data steward", "operator"]),
    default="privacy officer",
    show_default=True,
)
@click.option("--no-passphrase", is_flag=True, help="Leave the key file unencrypted (it is of mode 0600).")
@json_option
def person(name: str, key_file: Path, role: str, no_passphrase: bool, as_json: bool) -> None:
    """Make a key for NAME, on a machine of theirs, and print the lines to put in the policy.

    The passphrase is asked for, or taken from FEDSEEK_PERSON_PASSPHRASE.
    """
    from fedseek_site.people import make_person_key, policy_line

    passphrase = None if no_passphrase else os.environ.get(PASSPHRASE_VARIABLE)
    if passphrase is None and not no_passphrase:
        passphrase = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    public = make_person_key(key_file, name, passphrase)
    if as_json:
        click.echo(json.dumps({"name": name, "role": role, "key": public.hex()}, ensure_ascii=False))
    else:
        click.echo(policy_line(name, role, public))


@click.group(epilog="Example: fedseek-site policy check --folder /var/lib/fedseek/site")
def policy() -> None:
    """The site's policy: what it permits. It is a file; only its owner changes it."""


@policy.command("check", epilog="Example: fedseek-site policy check --folder /var/lib/fedseek/site")
@folder_option
@json_option
@click.argument("file", type=click.Path(path_type=Path), required=False)
def check(folder: Path, as_json: bool, file: Path | None) -> None:
    """Check FILE, or the policy of the site's folder; print its digest."""
    from fedseek_site.config import POLICY_FILE
    from fedseek_site.policy import load_policy

    path = file or folder / POLICY_FILE
    told = {"file": str(path), "digest": load_policy(path).digest()}
    click.echo(json.dumps(told, ensure_ascii=False) if as_json else f"{path}: valid, digest {told['digest']}")


@policy.command("show", epilog="Example: fedseek-site policy show --folder /var/lib/fedseek/site")
@folder_option
@json_option
@click.argument("file", type=click.Path(path_type=Path), required=False)
def show(folder: Path, as_json: bool, file: Path | None) -> None:
    """Everything FILE, or the policy of the site's folder, says, defaults included: key by key."""
    from fedseek_site.config import POLICY_FILE
    from fedseek_site.policy import load_policy

    document = load_policy(file or folder / POLICY_FILE).model_dump(mode="json", by_alias=True)
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    for table, entries in document.items():
        for key, value in entries.items() if isinstance(entries, dict) else ():
            click.echo(f"{table}.{key} = {json.dumps(value, ensure_ascii=False)}")


COMMANDS: tuple[click.Command, ...] = (
    status,
    plans,
    releases,
    approve,
    withdraw,
    accept_record,
    pause,
    resume,
    data,
    person,
    policy,
)


def ask_daemon(folder: Path, method: str, question: msgspec.Struct | None = None, *, timeout: float = 60.0) -> Any:
    """What the daemon of this folder answers, over the socket of a role that may ask."""
    from fedseek_site.local_api import ask, role_for

    run_folder = folder / "run"
    return ask(run_folder, role_for(run_folder, method), method, question, timeout=timeout)


def _stands(line: Mapping[str, Any]) -> str:
    """Where a plan or a release stands: its status, the rule that decides, and who has approved."""
    by = f", approved by {', '.join(line['approved_by'])}" if line["approved_by"] else ""
    why = f" ({line['rule']})" if line["rule"] else ""
    return f"{line['status']}{why}{by}"


def _plan(folder: Path, digest: str) -> tuple[Any, Plan, Roster]:
    """What the daemon shows of a plan, and the plan and roster themselves, checked to be the one that was named."""
    from fedseek_site.local_answers import PlanShown
    from fedseek_site.local_api import PlanAsked

    try:
        asked = msgspec.convert({"plan": digest.lower()}, PlanAsked)
    except msgspec.ValidationError:
        raise click.UsageError(f"got {digest!r}, wanted the first 12 or more hexadecimal digits of a digest") from None
    try:
        shown = msgspec.convert(ask_daemon(folder, "plan", asked), PlanShown)
    except msgspec.ValidationError as error:
        raise Malformed(f"the daemon shows a plan in another form: {error}", hint="install the same release") from None
    plan, roster = shown.open()
    if not plan.digest.startswith(asked.plan):
        raise Malformed(f"asked the daemon for plan {asked.plan}, it shows {plan.digest}")
    return shown, plan, roster


def _release(folder: Path, digest: str) -> ReleaseShown | None:
    """The release whose digest begins so, checked to be the one that was named; None if there is none here."""
    from fedseek_site.local_api import ReleaseAsked
    from fedseek_site.local_releases import read_shown

    prefix = digest.lower()
    try:
        msgspec.convert({"release": prefix}, ReleaseAsked)
    except msgspec.ValidationError:
        return None  # too short, or no digits of a digest
    found = [line["digest"] for line in ask_daemon(folder, "releases")["releases"] if line["digest"].startswith(prefix)]
    if not found:
        return None
    known = [line["digest"] for line in ask_daemon(folder, "plans")["plans"] if line["digest"].startswith(prefix)]
    if len({*found, *known}) > 1:
        raise click.UsageError(f"{digest!r} begins several digests, of plans or releases; wanted more of it")
    return read_shown(ask_daemon(folder, "release", ReleaseAsked(release=found[0])), prefix)


def _show_release(shown: ReleaseShown, language: str, *, as_json: bool = False, err: bool = False) -> None:
    from fedseek_site.release_words import describe_release

    lines = list(describe_release(shown, language))
    stands = f"{shown.status} {shown.rule}".strip()
    if as_json:
        told = {"digest": shown.digest, "stands": stands, "approved_by": shown.approved_by, "lines": lines}
        click.echo(json.dumps(told, ensure_ascii=False))
        return
    for line in lines:
        click.echo(line, err=err)
    click.echo(f"\nrelease {shown.digest}, drafted {shown.at}: {stands}", err=err)


def _approve_release(
    folder: Path, shown: ReleaseShown, person: str, key_file: Path, *, yes: bool, as_json: bool
) -> None:
    from fedseek_site.people import sign_release_approval

    if not yes:
        asked = f"Do you approve that {shown.site} signs this statement, and releases the adapter of run {shown.run}?"
        click.confirm(asked, abort=True, err=as_json)
    key, at = _person_key(key_file), int(time.time())
    signed = sign_release_approval(key, shown.digest, site=shown.site, person=person, at=at)
    _show(ask_daemon(folder, "approve_release", signed), as_json)


def _show_plan(folder: Path, digest: str, as_json: bool) -> None:
    from fedseek_site.plan_words import describe

    shown, plan, roster = _plan(folder, digest)
    rows = [*describe(plan, roster), ("announced", shown.at), ("stands", f"{shown.status} {shown.rule}".strip())]
    rows += [("approved by", name) for name in shown.approved_by]
    if as_json:
        click.echo(json.dumps({"rows": rows}, ensure_ascii=False))
        return
    for word, text in rows:
        click.echo(f"{word + ':':<20}{text}")


def _person_key(path: Path) -> Any:
    from fedseek_site.people import is_encrypted, load_person_key

    if not is_encrypted(path):
        return load_person_key(path, None)
    given = os.environ.get(PASSPHRASE_VARIABLE)
    return load_person_key(path, given or click.prompt("Passphrase", hide_input=True, err=True))


def _show(told: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(told, ensure_ascii=False))
        return
    for key, value in told.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        click.echo(f"{key.replace('_', ' ') + ':':<20}{'-' if shown in (None, '') else shown}")
