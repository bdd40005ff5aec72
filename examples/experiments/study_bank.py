"""The bank of probes, one thing at a time: what it has to be made of, and what it does not find.

    python examples/study_bank.py [--encoder vits] [--task mnist] [--quick]

Banks that differ in the defender's data, in the probes' patches and in whose classes they are, against attacks that are
ever less like a probe. For each: the score that the attacker's target class gets in the contributor who carries the
backdoor, how far it stands out from all other scores, and what disarming whoever is flagged leaves of the attack. No
shrinking on top, so that what the bank does is seen by itself. All on validation images.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

import torch

from bench import asking, attackers, command, data, defenders, handed, report, zoo
from bench import cache as disk
from bench.attackers import Backdoor
from bench.defenders import Bank, merged
from bench.handed import ATTACKERS, Attacker, Handed
from bench.merges import RULES
from bench.zoo import Recipe, Setting
from taskvec import TaskVector
from taskvec.defenses import bank_scores
from taskvec.metrics import accuracy, attack_success_rate, estimate

SEEDS, TARGET = (0, 1, 2), 1
MERGES = ("task arithmetic", "TIES")
CORNERS = tuple((7, place) for place in attackers.CORNERS)


def elsewhere(place: object, size: int = 5) -> Attacker:
    """BadMerging with its patch in another place."""

    def plan(task: str, target: int, seed: int) -> attackers.Plan:
        return attackers.on_task(task, target, seed)._replace(
            backdoors=(Backdoor(task, target, "optimised", size, place),)
        )

    return partial(handed.from_plan, plan=plan)


ATTACKS: dict[str, Attacker] = {
    "BadMerging-on": ATTACKERS["BadMerging-on"],
    "3x3": elsewhere("bottom-right", 3),
    "another corner": elsewhere("top-left"),
    "across four tokens": elsewhere((18, 18)),
    "BadNets": ATTACKERS["BadNets"],
    "blended": ATTACKERS["blended"],
    "BadMerging-off": ATTACKERS["BadMerging-off"],
    "colluding": ATTACKERS["colluding"],
    "against the bank": ATTACKERS["against the bank"],
}


def banks(task: str) -> dict[str, Bank]:
    """What the defender may have, for one attacked task."""
    plain = Bank((task,))
    return {
        "half of the data": plain,
        "ten images a class": plain._replace(rows="few"),
        "5x5 patches": plain._replace(places=((5, "bottom-right"),)),
        "four corners": plain._replace(places=CORNERS),
        "another task's": plain._replace(tasks=(handed.after(task),)),
    }


def of_seed(setting: Setting, task: str, names: Sequence[str], seed: int) -> list[dict[str, disk.Json]]:
    """A row for every attack and bank."""
    base, clean = zoo.base(setting), handed.contributors(setting, seed)
    rows = []
    for name in names:
        attack = ATTACKS[name](setting, task, TARGET, seed)
        vectors = {owner: TaskVector.between(base, model) for owner, model in {**clean, **attack.models}.items()}
        asked = partial(figures, setting, task, attack)
        about = {"attack": name, "seed": seed}
        rows.append(about | {"bank": "none"} | {rule: asked(merged(setting, RULES[rule], vectors)) for rule in MERGES})
        for label, of in banks(task).items():
            own = defenders.bank(setting, of)
            flags = defenders.found(own, vectors)
            read = scores(list(vectors), next(iter(attack.models)), bank_scores(vectors.values(), own), task)
            read |= {"found": float(bool(flags.keys() & attack.models.keys()))}
            read |= {"false alarms": float(len(flags.keys() - attack.models.keys()))}
            left = defenders.disarmed(vectors, flags)
            after = {rule: asked(merged(setting, RULES[rule], left)) for rule in MERGES}
            rows.append(about | {"bank": label} | read | after)
    return rows


def scores(
    owners: Sequence[str], attacker: str, found: Sequence[Mapping[tuple[str, int], float]], task: str
) -> dict[str, float]:
    """The score of the attacker's target class, or the highest one in a bank without it, and how far it stands out."""
    mine = found[owners.index(attacker)]
    own = mine.get((task, TARGET), max(mine.values()))
    everything = [score for row in found for score in row.values()]
    middle = median(everything)
    spread = 1.4826 * median(abs(score - middle) for score in everything)
    return {"score": own, "deviations": (own - middle) / spread, "first": float(own == max(everything))}


def figures(setting: Setting, task: str, attack: Handed, params: zoo.Params) -> dict[str, float]:
    """ASR, and mean accuracy over the tasks."""
    ask = partial(asking.remembering(setting), asking.model(params))
    fooled = attack_success_rate(
        partial(ask, task=task),
        *data.validation(task),
        target=TARGET,
        trigger=attackers.trigger_of(setting, attack.plan, attack.plan.backdoors[0]),
        batch=asking.WHOLE,
    )
    rates = [accuracy(partial(ask, task=own), *data.validation(own), batch=asking.WHOLE).value for own in data.TASKS]
    return {"asr": fooled.value, "accuracy": sum(rates) / len(rates)}


def tables(title: str, rows: Sequence[Mapping[str, disk.Json]]) -> str:
    """Means over seeds with their intervals."""
    body = []
    for attack, bank in dict.fromkeys((row["attack"], row["bank"]) for row in rows):
        own = [row for row in rows if (row["attack"], row["bank"]) == (attack, bank)]
        plain = {row["seed"]: row for row in rows if (row["attack"], row["bank"]) == (attack, "none")}
        read = ["-"] * 4
        if bank != "none":
            read = [f"{estimate(row[name] for row in own):.2f}" for name in ("score", "deviations")]
            read += [f"{sum(row['found'] for row in own):.0f} of {len(own)}"]
            read += [f"{sum(row['false alarms'] for row in own):.0f}"]
        left = [f"{estimate(100 * row[rule]['asr'] for row in own):.1f}" for rule in MERGES]
        cost = [
            f"{estimate(100 * (row[r]['accuracy'] - plain[row['seed']][r]['accuracy']) for row in own):.1f}"
            for r in MERGES
        ]
        body.append([attack, bank, *read, *left, *cost])
    header = ["attack", "bank", "score", "deviations", "found", "false alarms", *MERGES]
    header += [f"{rule}: accuracy" for rule in MERGES]
    text = (
        f"{title}: the score of the attacker's class; ASR after disarming whoever is flagged, beyond 6 deviations,\n"
        "in per cent of validation images; accuracy against the undefended merge, points"
    )
    return report.text_table(text, header, body)


def prepare(setting: Setting, task: str, seeds: Sequence[int], workers: int) -> None:
    """Train what the seeds share: the clean contributors and the banks."""
    every = list(banks(task).values())
    recipes = [Recipe(own, seed, handed.ROWS) for own in data.TASKS for seed in seeds]
    zoo.prepare(setting, recipes + [Recipe(own, defenders.SEED, bank.rows) for bank in every for own in bank.tasks])
    plans = [plan for bank in every for by_place in bank.plans().values() for plan in by_place]
    with zoo.workforce(workers) as pool:
        zoo.at_once(pool, "banks", partial(attackers.upload, setting), dict.fromkeys(plans))


def main() -> None:
    given = command.suite_options(__doc__, SEEDS).parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    setting, seeds = Setting(given.encoder), [0] if given.quick else given.seeds
    names = list(ATTACKS)[:1] if given.quick else list(ATTACKS)
    prepare(setting, given.task, seeds, given.workers)
    found = command.by_seed(partial(of_seed, setting, given.task, names), seeds, given.workers)
    rows = [row for own in found.values() for row in own]
    name = f"{given.encoder}-{given.task}"
    text = tables(f"{given.encoder}, {given.task}, {len(seeds)} seeds", rows)
    print(text)
    if not given.quick:
        report.keep("bank", name, {"rows": rows})
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
