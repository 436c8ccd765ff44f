"""The words of the privacy statement: a table for English, and one for Chinese.

``statement_page`` renders all languages by the same code. A test holds the tables to the fields of the statement, to
every line of what is not covered, and to every guard and check, so that they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fedseek.statement import (
    ACCOUNTANT,
    NEIGHBORING_RELATION,
    NO_TRUST_MODEL,
    NOT_COVERED,
    SITE_MECHANISM,
    SITE_RELATION,
    SITE_TRUST_MODEL,
    TRUST_MODEL,
)

_NOT_COVERED_IN_CHINESE: Final = (
    "适配器所反映的群体规律：这正是它应当学到的，与其中任何一个人在不在数据之中无关",
    "出现在多个参与方的人，或在同一参与方以多个标识出现的人：其隐私损失会累加",
    "当隐私单元为记录时，同一个人的多于一条的记录",
    "在相同数据上的其他运行：其隐私损失会累加，不计入本声明；由参与方的台账汇总",
    "某个参与方是否参加，以及它持有多少条记录",
    "为评估而留出的记录：各参与方可看到其指标的总和，以及由此得出的停止训练的票数，均未加噪声；是否达到计划规定的下限为各方所知",
    "训练之前查看记录而作出的选择：标签、提示语、参数设置",
    "基础模型：它是在别处训练的",
    "参与方太少而不足以相互掩护时的加噪更新：两个参与方的总和中，每一方都可减去自己的部分；与协调方合谋的参与方若多于"
    "计划所规定的数目，则一轮所能隐藏的内容少于预期",
    "金丝雀审计未能发现的泄露：其界限说明泄露至少有多少，而非至多有多少",
    "参与方所运行的是否确为公开发布的本软件：声明是该参与方签名作出的陈述",
)


@dataclass(frozen=True, slots=True)
class Words:
    """One language.

    Attributes:
        file: name of the page.
        title, intro, not_covered_title, unsigned: of the page. ``intro`` has {name}, {run}, {plan} and {roster}; ``unsigned``
            has {sites}.
        guarantee, nothing: one sentence about a site; the first has {epsilon}, {delta}, {unit}, {relation}.
        not_in_adapter: about a site whose update is not in the adapter.
        columns: heads of the tables: of fields, of guards, and of checks.
        fields: by name, what each field of the statement is called.
        stage, site_level, audit: the same for the fields of a stage, and of these two.
        none, unlimited, colon, comma: how absence is written, and that of a limit, and what separates.
        guards, checks: by name, what each means.
        terms: what fixed texts of a statement are in this language; a text that is not here stands as it is.
    """

    file: str
    title: str
    intro: str
    not_covered_title: str
    unsigned: str
    guarantee: str
    nothing: str
    not_in_adapter: str
    columns: tuple[tuple[str, str], tuple[str, str], tuple[str, str, str]]
    fields: Mapping[str, str] = field(repr=False)
    stage: Mapping[str, str] = field(repr=False)
    site_level: Mapping[str, str] = field(repr=False)
    audit: Mapping[str, str] = field(repr=False)
    none: str
    unlimited: str
    colon: str
    comma: str
    guards: Mapping[str, str] = field(repr=False)
    checks: Mapping[str, str] = field(repr=False)
    terms: Mapping[str, str] = field(repr=False)

    def term(self, text: str) -> str:
        """A fixed text of the statement in this language."""
        return self.terms.get(text, text)


ENGLISH: Final = Words(
    file="PRIVACY.md",
    title="Privacy statement",
    intro=(
        "What the adapter `{name}` of run {run} cost in privacy, stated by each site for its own data and signed by it. "
        "The terms are those of NIST SP 800-226. The same as JSON, which is what is signed: `privacy-<site>.json` with "
        "`privacy-<site>.sig`. Plan `{plan}`, roster `{roster}`."
    ),
    not_covered_title="Not covered",
    unsigned="**Updates of these sites are in the adapter, and they have signed no statement:** {sites}.",
    guarantee="**({epsilon}, {delta})-differential privacy** for one {unit} ({relation}).",
    nothing="**No privacy guarantee.** The plan asked for none; treat the adapter like the training data.",
    not_in_adapter="No update of this site is in the adapter.",
    columns=(("What", "Stated"), ("Guard", "What it has shown"), ("Check", "Wanted", "Got")),
    fields={
        "version": "Version of the statement",
        "run": "Run",
        "plan_digest": "Plan, SHA-256",
        "roster_digest": "Roster, SHA-256",
        "site": "Site",
        "kind": "Kind of site",
        "files": "Files of the adapter, SHA-256",
        "tensors": "Trained values by scope, digest",
        "contributors": "Sites whose updates are in the adapter",
        "mechanism": "Mechanism",
        "unit": "Unit of privacy",
        "max_records_per_unit": "Most records of a unit that were used",
        "neighboring_relation": "Neighbouring relation",
        "epsilon": "Epsilon (privacy loss) of the whole run, upper bound",
        "epsilon_second_opinion": "Epsilon by a second accountant",
        "delta": "Delta",
        "accountant": "Accountant",
        "stages": "Stages of training",
        "l2_clip_norm": "Clip norm (L2) of a unit's gradient",
        "site_level": "Guarantee for a whole site, stated apart",
        "audit": "Canary audit: lower bounds on epsilon",
        "guards_passed": "Guards that held while it trained",
        "checks": "Checks of the release gate",
        "trust_model": "Trust model",
        "not_covered": "Not covered",
    },
    stage={
        "noise_multiplier": "Noise multiplier",
        "sampling_probability": "Sampling probability of a unit in a step",
        "num_steps": "Steps trained",
    },
    site_level={
        "epsilon": "Epsilon for a whole site",
        "delta": "Delta",
        "l2_clip_norm": "Clip norm (L2) of a site's update of one round",
        "neighboring_relation": "Neighbouring relation",
        "mechanism": "Mechanism",
        "trust_model": "Trust model",
    },
    audit={
        "canaries": "Canary candidates, each in training by the toss of a coin",
        "confidence": "Confidence of each bound",
        "released_adapter": "At least, for whoever has the released adapter",
        "every_round": "At least, for whoever saw the adapter of every round",
    },
    none="none",
    unlimited="all of them",
    colon=": ",
    comma=", ",
    guards={
        "clipping_applied": "the gradient of every record was clipped",
        "records_uncoupled": "a record's gradient does not depend on the other records of its batch",
        "no_record_lost": "every record that was drawn is in its step",
        "noise_not_seeded_by_plan": "no seed repeats the noise, here or at another site",
        "noise_added": "noise of the plan's size was added",
        "cryptographic_randomness": "noise and draws came from a cryptographic generator keyed by the operating system",
        "sampling_from_plan": "units were drawn with the plan's probability",
        "draws_independent": "each unit was drawn by a coin of its own in each step",
        "every_tensor_trained": "the optimiser moved the tensors of the model, each with a gradient for every record",
        "poisson_batches_used": "training was on the records drawn, at most one of a unit in a step",
        "composition_over_run": "every step of the run is accounted for",
        "no_unnoised_metrics": "no figure of training records left the site without noise",
        "site_update_clipped": "every update of the site was clipped",
        "site_noise_added": "the site's share of noise was in every update",
    },
    checks={
        "budget": "Steps trained = accounted, all in the site's ledger, within the plan; by stage",
        "guards": "Guards passed",
        "epsilon": "Epsilon within what the plan promises",
        "canary-audit": "Lower bounds of the canary audit within the stated epsilon",
        "utility": "Utility on held-back records reaches the plan's floor",
        "contributors": "Sites whose updates are in the adapter",
        "adapter": "Largest value of the adapter: finite, and moved",
    },
    terms={"dp-sgd": "DP-SGD (Poisson sampling, clipping, Gaussian noise)"},
)

CHINESE: Final = Words(
    file="PRIVACY.zh.md",
    title="隐私声明",
    intro=(
        "本页说明适配器 `{name}`（运行 {run}）的隐私代价：由每个参与方就其自有数据作出声明并签名。术语依照 NIST SP 800-226。"
        "被签名的是同一内容的 JSON 文件：`privacy-<参与方>.json`，签名为 `privacy-<参与方>.sig`。计划 `{plan}`，名册 `{roster}`。"
    ),
    not_covered_title="不在保证范围之内",
    unsigned="**下列参与方的更新已计入适配器，但未签署声明：** {sites}。",
    guarantee="以{unit}为隐私单元，满足 **({epsilon}, {delta})-差分隐私**（相邻关系：{relation}）。",
    nothing="**没有隐私保证。** 计划未作此要求；请像对待训练数据一样对待该适配器。",
    not_in_adapter="该参与方的更新未计入适配器。",
    columns=(("项目", "声明内容"), ("运行时校验", "所证明的事项"), ("检查项", "要求", "实际")),
    fields={
        "version": "声明版本",
        "run": "运行",
        "plan_digest": "计划的 SHA-256",
        "roster_digest": "名册的 SHA-256",
        "site": "参与方",
        "kind": "参与方类别",
        "files": "适配器文件的 SHA-256",
        "tensors": "各作用域训练所得数值的摘要",
        "contributors": "更新已计入适配器的参与方",
        "mechanism": "隐私机制",
        "unit": "隐私单元",
        "max_records_per_unit": "每个隐私单元最多使用的记录数",
        "neighboring_relation": "相邻关系",
        "epsilon": "整个运行的 ε（隐私损失），上界",
        "epsilon_second_opinion": "另一核算方法得出的 ε",
        "delta": "δ",
        "accountant": "隐私核算方法",
        "stages": "训练阶段",
        "l2_clip_norm": "单个隐私单元梯度的裁剪范数（L2）",
        "site_level": "对整个参与方的保证（另行声明）",
        "audit": "金丝雀审计：ε 的下界",
        "guards_passed": "训练过程中通过的运行时校验",
        "checks": "发布门控的检查项",
        "trust_model": "信任模型",
        "not_covered": "不在保证范围之内",
    },
    stage={
        "noise_multiplier": "噪声乘数",
        "sampling_probability": "每步中隐私单元的采样概率",
        "num_steps": "已训练步数",
    },
    site_level={
        "epsilon": "对整个参与方的 ε",
        "delta": "δ",
        "l2_clip_norm": "参与方单轮更新的裁剪范数（L2）",
        "neighboring_relation": "相邻关系",
        "mechanism": "隐私机制",
        "trust_model": "信任模型",
    },
    audit={
        "canaries": "候选金丝雀样本数，各以独立掷币决定是否参加训练",
        "confidence": "每个下界的置信水平",
        "released_adapter": "对持有所发布适配器者，至少为",
        "every_round": "对看到每一轮适配器者，至少为",
    },
    none="无",
    unlimited="不限",
    colon="：",
    comma="、",
    guards={
        "clipping_applied": "每条记录的梯度都经过裁剪",
        "records_uncoupled": "一条记录的梯度不受同批其他记录影响",
        "no_record_lost": "每条被抽中的记录都进入了相应的训练步",
        "noise_not_seeded_by_plan": "无论在本地还是其他参与方，没有任何种子能重现噪声",
        "noise_added": "已加入计划所要求大小的噪声",
        "cryptographic_randomness": "噪声与抽样均来自由操作系统提供密钥的密码学随机数发生器",
        "sampling_from_plan": "隐私单元按计划规定的概率抽取",
        "draws_independent": "每一步中每个隐私单元均由独立的掷币决定是否被抽中",
        "every_tensor_trained": "优化器更新的正是模型自身的张量，且每个张量对每条记录都有梯度",
        "poisson_batches_used": "训练所用即被抽中的记录，每步中每个隐私单元至多一条",
        "composition_over_run": "本次运行的每一步都已计入核算",
        "no_unnoised_metrics": "没有任何由训练记录算出的未加噪数值离开参与方",
        "site_update_clipped": "参与方的每次更新都经过裁剪",
        "site_noise_added": "参与方的每次更新都含有其噪声份额",
    },
    checks={
        "budget": "训练步数 = 核算步数，全部记入参与方台账，且不超出计划（按阶段）",
        "guards": "通过的运行时校验",
        "epsilon": "ε 不超过计划的承诺",
        "canary-audit": "金丝雀审计的下界不超过所声明的 ε",
        "utility": "留出记录上的效用达到计划规定的下限",
        "contributors": "更新已计入适配器的参与方数量",
        "adapter": "适配器的最大数值：有限，且已偏离初始值",
    },
    terms={
        "record": "记录",
        "customer": "客户",
        "patient": "患者",
        "none": "无",
        "dp-sgd": "DP-SGD（泊松采样、梯度裁剪、高斯噪声）",
        NEIGHBORING_RELATION: "增加或移除一个隐私单元",
        ACCOUNTANT: "隐私损失分布（dp_accounting）；第二意见：Rényi 差分隐私",
        TRUST_MODEL: "任何内容离开参与方之前，噪声已在本地加入；对其他任何一方均成立",
        NO_TRUST_MODEL: "不加噪声：更新仅凭加密与掩码隐藏在总和之中",
        SITE_MECHANISM: "分布式离散高斯机制：各参与方的更新经裁剪、取整，并加入其噪声份额",
        SITE_RELATION: "将一个参与方的全部更新替换为零",
        SITE_TRUST_MODEL: "噪声由所有参与方共同构成；只要串谋的参与方不多于计划所规定的数目，保证即成立",
        **dict(zip(NOT_COVERED, _NOT_COVERED_IN_CHINESE, strict=True)),
    },
)
LANGUAGES: Final = (ENGLISH, CHINESE)
