"""What the gate can find: every finding's id, name, meaning and remedy. docs/gate.md repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal


class Level(str, Enum):
    """What a finding does to the outcome.

    `fail`: the adapter does not pass. `undecided`: it cannot be told, so it does not pass either.
    `note`: it is only reported.
    """

    fail = "fail"
    undecided = "undecided"
    note = "note"

    @property
    def severity(self) -> int:
        """0 for the worst."""
        return list(Level).index(self)

    @property
    def effect(self) -> str:
        """The same as a sentence about a rule."""
        return {"fail": "It fails.", "undecided": "It leaves undecided.", "note": "It is a note."}[
            self.value
        ]


@dataclass(frozen=True)
class Rule:
    """One kind of finding.

    Attributes:
        id: stable, `SP001`.
        name: stable, in words with hyphens.
        level: what it does to the outcome unless the policy allows it.
        meaning: what was found, in general.
        remedy: what to do about it.
        can_be_ignored: whether `--ignore` takes it; what cannot be read is never a pass.
        worst: which of the numbers of its findings is the worst; None where they have none.
    """

    id: str
    name: str
    level: Level
    meaning: str
    remedy: str
    can_be_ignored: bool = True
    worst: Literal["lowest", "highest"] | None = None

    @property
    def text(self) -> str:
        """What was found, in general, and what it does."""
        return f"{self.meaning} {self.level.effect}"


UNUSABLE = "SP090"
"""The rule of what cannot be read."""

_RULES = (
    Rule(
        "SP001",
        "module-below-threshold",
        Level.fail,
        "The cosine of a module's update and its projection is at or below the threshold, and "
        "nothing shows that the module was projected: the update points away from alignment.",
        "Patch the adapter with `safeproj patch`, train again, or raise `max-below` or lower the "
        "threshold if an evaluation of the adapter justifies it.",
        worst="lowest",
    ),
    Rule(
        "SP002",
        "module-uncertain",
        Level.undecided,
        "The module's cosine may lie on either side of the threshold: the alignment file keeps "
        "part of C, and within the bound of that error both are possible; or `peft_version` says "
        "that an earlier PEFT wrote a square stack of experts, which today's reads as another "
        "update.",
        "Check against the two checkpoints, or against an alignment file that keeps more of C; "
        "train stacks of experts again with PEFT 0.19.1 or later.",
        worst="lowest",
    ),
    Rule(
        "SP003",
        "module-not-scored",
        Level.fail,
        "Less of the adapter was scored than the policy requires: base and aligned are equal at "
        "a module, it has no weight in what is checked against, or only part of it has one.",
        "Check against the checkpoints that the adapter was trained on, or an alignment file with "
        "all of its modules; lower `coverage` only for modules that you judge otherwise.",
    ),
    Rule(
        "SP004",
        "full-weight-change",
        Level.fail,
        "A tensor replaces a weight or bias, or rows of one (modules_to_save, trainable tokens, a "
        "copy of a base layer, the vocabulary with added tokens), and is not equal to the aligned "
        "model's, or cannot be compared: no score covers it and no projection touches it.",
        "Train without modules_to_save and biases, or judge these tensors by an evaluation and "
        "set `allow.full-weight-changes`. Where tokens were added, PEFT saves the embedding and "
        "the head with them by itself; `safeproj eval` resizes the model as they need it.",
    ),
    Rule(
        "SP005",
        "unknown-tensor",
        Level.fail,
        "A tensor belongs to no update and to nothing that the config accounts for: some loader "
        "may use it, and nothing can be said of it.",
        "Remove the tensor, or save the adapter again with PEFT.",
    ),
    Rule(
        "SP006",
        "unmatched-module",
        Level.fail,
        "An adapted module has no weight, or none that fits, in what is checked against: it "
        "cannot be scored, and is either for another model or under a name made to look alike.",
        "Check against the model that the adapter was trained on; `--map` gives names that the "
        "checkpoint has in another form.",
    ),
    Rule(
        "SP007",
        "dora-magnitude",
        Level.fail,
        "A module has a DoRA magnitude, which scales every output of the weight and which no "
        "score covers.",
        "Judge the adapter by an evaluation and set `allow.dora-magnitudes`, or train without "
        "DoRA.",
    ),
    Rule(
        "SP008",
        "empty-update",
        Level.fail,
        "The update of a module is zero: it was not trained, or was projected away entirely.",
        "Find out why; a module that is not to be trained does not belong to `target_modules`.",
    ),
    Rule(
        "SP009",
        "lora-bias",
        Level.fail,
        "The bias of a lora_B shifts the module's output; the cosine does not cover it and it was "
        "not projected.",
        "Project the module (`safeproj patch --all`), or train without lora_bias.",
    ),
    Rule(
        "SP010",
        "changed-base-weights",
        Level.fail,
        "The adapter was trained from an initialisation that changes the base weights, so that "
        "its tensors are not the update of the weights that it was checked against: the config "
        "names it, or the updates are a part of the weights themselves.",
        "Convert it on saving (save_pretrained with path_initial_model_for_weight_conversion), "
        "patch it, which converts PiSSA and OLoRA, or fold it with `safeproj salora fold`.",
    ),
    Rule(
        "SP011",
        "config-mismatch",
        Level.fail,
        "The config and the tensors do not agree about which modules are adapted or how, or the "
        "names of tensors are none that PEFT looks for: loaders would differ in what they load.",
        "Save the adapter again with PEFT from the model that it was trained on.",
    ),
    Rule(
        "SP012",
        "large-update",
        Level.fail,
        "An update is scaled by more, or is larger relative to alignment, than the policy allows, "
        "by PEFT or by a reader that knows no patterns: cosines say where updates point, not how "
        "far they go.",
        "Check lora_alpha and the rank; raise `max-scaling` or `max-size` if the adapter is meant "
        "to be so strong.",
    ),
    Rule(
        "SP013",
        "rank-above-dimensions",
        Level.fail,
        "The rank of a module is larger than a dimension of its weight, which no training needs.",
        "Save the adapter with a rank that fits, or find out what the further rows are for.",
    ),
    Rule(
        "SP014",
        "other-weights",
        Level.fail,
        "The directory holds further files with weights, or that may hold weights, by their bytes "
        "and not by their names: they were not checked, and another loader may prefer them. "
        "Beside a `config.json` they are the base model that transformers loads.",
        "Remove them: checkpoints of the training, merged models, converted copies, embeddings, "
        "archives.",
    ),
    Rule(
        "SP015",
        "unsafe-path",
        Level.fail,
        "A file of the adapter, or an adapter among many, is a link, no regular file, or has a "
        "name that leads out of the directory: what is published may be something else than what "
        "was checked.",
        "Replace the link by the file it should be; rename the file.",
    ),
    Rule(
        "SP016",
        "confusable-names",
        Level.fail,
        "Names of tensors or files differ only in case or in characters that look alike, or that "
        "some file system folds: one of them is made to be taken for the other.",
        "Find out where the second one comes from, and remove it.",
    ),
    Rule(
        "SP017",
        "unjudged-file",
        Level.note,
        "The directory holds files that can change what a model is given or what is run: code, a "
        "tokenizer or processor, a chat template, a config of the model or of its generation. "
        "Scores of weights say nothing of them.",
        "Review them as you review code.",
    ),
    Rule(
        "SP018",
        "other-base-model",
        Level.fail,
        "The config names another model, or another revision of it, to load the adapter on than "
        "the aligned one that it was checked against. Its findings hold for the latter.",
        "Check against the model that the config names, or correct the config.",
    ),
    Rule(
        "SP019",
        "imports",
        Level.fail,
        "The config names Python code outside the usual libraries that loaders may import.",
        "Review the code, or take the setting out of the config.",
    ),
    Rule(
        "SP020",
        "missing-provenance",
        Level.fail,
        "The adapter has no safeproj.json, so nothing says what was done to it and from what.",
        "Patch it with `safeproj patch`, which writes one.",
    ),
    Rule(
        "SP021",
        "manifest-mismatch",
        Level.fail,
        "safeproj.json does not describe this adapter: digests of tensors or of the config, the "
        "modules or their shapes are others than recorded.",
        "Restore the directory that `safeproj patch` wrote, or patch the adapter again.",
    ),
    Rule(
        "SP022",
        "other-projection",
        Level.fail,
        "safeproj.json says that modules were projected with another method, another projector "
        "or against other models than this check uses: that does not answer for them.",
        "Check with the method, projector and models of the policy, and patch with the same.",
    ),
    Rule(
        "SP023",
        "weak-evidence",
        Level.fail,
        "A module counts as projected on the word of safeproj.json alone, and the policy wants it "
        "recomputed or signed.",
        "Give `--original` with the adapter before patching, or `--public-key` with a signed "
        "directory.",
    ),
    Rule(
        "SP024",
        "projection-mismatch",
        Level.fail,
        "A tensor is not what projecting the original adapter gives.",
        "Patch the original again with this version, and find out who changed the tensor.",
    ),
    Rule(
        "SP025",
        "changed-since-original",
        Level.fail,
        "A tensor, the config or another file that patching leaves alone differs from the original "
        "adapter's.",
        "Find out what was changed and why, and patch the original again.",
    ),
    Rule(
        "SP030",
        "identity-mismatch",
        Level.fail,
        "What was checked against is not what the policy pins.",
        "Give the pinned model or file, or update the policy after a review.",
    ),
    Rule(
        "SP031",
        "identity-unknown",
        Level.undecided,
        "The policy pins something whose identity this check cannot see.",
        "Pin it in the form that is at hand: org/name@commit on the Hub, sha256:... for files.",
    ),
    Rule(
        "SP032",
        "bad-signature",
        Level.fail,
        "The policy wants a signature by its public key, and there is none, or it is not of these "
        "files.",
        "Sign the directory as it is published with `safeproj sign`, last of all steps.",
    ),
    Rule(
        "SP035",
        "cancelling-factors",
        Level.fail,
        "The terms of a module's `B A` cancel: its factors are more than a thousand times as large "
        "as the update that is left of them, and sums in lower precision see something else. The "
        "scores here are computed without the cancellation.",
        "Find out what the cancelling rows and columns are for, and save the adapter again from "
        "the model that it was trained on.",
        worst="highest",
    ),
    Rule(
        "SP036",
        "changes-when-cast",
        Level.fail,
        "Cast to bfloat16 or float16, as servers do, the factors of a module make another update "
        "than as they are stored, or are beyond the range: what is served is not what is "
        "published.",
        "Save the adapter in the dtype that it is served in, and evaluate it so; raise "
        "`max-cast-change` if it is only ever served as it is stored.",
        worst="highest",
    ),
    Rule(
        "SP037",
        "outside-alignment",
        Level.fail,
        "Too much of an update, in absolute terms, points away from its projection, or lies in "
        "output directions in which alignment hardly moved the weight: whatever its cosine, which "
        "a further part along alignment lifts.",
        "Patch the adapter with `safeproj patch`, train again, or raise `max-outside` or "
        "`max-unseen` if an evaluation of the adapter justifies it.",
    ),
    Rule(
        "SP038",
        "unknown-file",
        Level.note,
        "The directory holds a file of a kind that is on no list of what is found beside adapters.",
        "Find out what reads it, and remove it if nothing does.",
    ),
    Rule(
        "SP039",
        "runs-code",
        Level.fail,
        "A file beside the adapter is a compiled program, or a config that makes loaders run code "
        "that is none of theirs (`auto_map`, a kernel from a repository).",
        "Remove the program or the setting; who needs it has it from the base model.",
    ),
    Rule(
        "SP040",
        "odd-mode",
        Level.fail,
        "A file has further names (hard links), through which it can be changed after the check, "
        "or runs with its owner's rights. That everyone may change or execute it is a note.",
        "Copy the directory, such as with `cp -r --no-preserve=all`, and check the copy.",
    ),
    Rule(
        "SP041",
        "unlistable",
        Level.undecided,
        "A directory cannot be listed, or a file in it not be read: what is there is not known.",
        "Make it readable for whoever checks, or remove it.",
        can_be_ignored=False,
    ),
    Rule(
        "SP042",
        "other-reader",
        Level.fail,
        "A program that the policy names (`readers`) would refuse the adapter, or compute another "
        "update of it than the one that was scored.",
        "Serve the adapter with another program, or save it in a form that this one reads as PEFT "
        "does: docs/readers.md says what each makes of an adapter.",
    ),
    Rule(
        "SP043",
        "conditional-update",
        Level.fail,
        "The update acts only where something that no score sees switches it on: a sequence of "
        "tokens, or a router. An evaluation without it says nothing of the adapter.",
        "Evaluate the adapter with what switches it on and set `allow.conditional-updates`, or "
        "train without it.",
    ),
    Rule(
        "SP044",
        "unjudged-setting",
        Level.fail,
        "The config has a setting that changes how the model is loaded or how the adapter was "
        "trained, and that no score covers.",
        "Review the setting, or take it out of the config.",
    ),
    Rule(
        "SP045",
        "unmeasured-behaviour",
        Level.fail,
        "Nothing says what the model does with the adapter: neither safeproj.json nor an "
        "`--evaluation`. Form and provenance say how an adapter was made, and cosines where its "
        "updates point.",
        "Measure it with `safeproj eval --format json` on prompts of what you fear and of what the "
        "adapter is for, and give the report as `--evaluation`.",
    ),
    Rule(
        "SP046",
        "uncounted-evaluation",
        Level.fail,
        "An evaluation does not count: it is of another adapter or model, was made otherwise than "
        "the policy wants, or says what does not follow from its verdicts.",
        "Evaluate the adapter as it is published, with the prompts, the judge and the model of the "
        "policy, all prompts of a file, and this version; or change `[behaviour]` after a review.",
    ),
    Rule(
        "SP047",
        "behaviour-out-of-bounds",
        Level.fail,
        "An evaluation that counts does not show what the policy wants: the interval of a share "
        "reaches beyond its bound, as too many answers comply, too few refuse or are right, or the "
        "prompts are too few to tell.",
        "Repair the adapter (`safeproj patch`), or train it again; measure on more prompts where "
        "the share itself is within the bound.",
    ),
    Rule(
        "SP048",
        "unpinned-evaluation",
        Level.note,
        "An evaluation counts whose prompts or model nothing pins: whoever made it chose them.",
        "Pin the files of prompts in `[behaviour.sets]`, and `model` where the check is given no "
        "`--aligned`.",
    ),
    Rule(
        "SP050",
        "training-state",
        Level.fail,
        "The directory holds what a trainer kept to go on (`training_args.bin`, `optimizer.pt`, "
        "`rng_state.pth` and their like), or another pickle: whoever loads it runs the code in it, "
        "and no one needs it who serves the adapter.",
        "Remove it; `safeproj patch` leaves it out. Keep it where the training goes on, and set "
        "`allow.training-state` if it is to be published.",
    ),
    Rule(
        "SP051",
        "nothing-changed",
        Level.note,
        "safeproj.json records a run of `safeproj patch` that changed no update: the adapter does "
        "what it did before.",
        "Look at the cosines with `safeproj inspect`, and patch with `--layers`, `--all` or a "
        "higher threshold; or publish the adapter as it came.",
    ),
    Rule(
        UNUSABLE,
        "unusable-input",
        Level.undecided,
        "The adapter cannot be read or scored, so nothing can be said of it.",
        "The message says what is wrong with it.",
        can_be_ignored=False,
    ),
)

RULES = {rule.id: rule for rule in _RULES}
"""Every rule by its id."""
