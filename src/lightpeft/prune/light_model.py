"""The live light model: a pruned `PeftModel` with its plan, which it saves with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, SupportsIndex, cast

from peft import PeftModel
from transformers import PreTrainedModel

from lightpeft.errors import LightPeftError, require
from lightpeft.files import explain_content_errors, replacing_folder
from lightpeft.models.all_weights import trained_weights
from lightpeft.models.repositories import Token
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary.cutting import vocabulary_of
from lightpeft.peft_kinds.sites.live_sites import own_adapter
from lightpeft.plans.prune_plan import PrunePlan

_KIND = "_peft_class"
"""Attribute of a light class that is made at run time: the PEFT class that it was made from."""


class LightModel(PeftModel):
    """A pruned `PeftModel`, which trains, generates and merges like others; `save_pretrained` writes a light adapter.

    Example:
        model = load_light("adapter")
        print(model.light_plan.summary())
        model.save_pretrained("copy")
    """

    light_plan: PrunePlan
    """Units of the dense base that this model keeps."""
    light_metrics: dict[str, Any]
    """Metrics of this model by name; saved with it."""
    light_intervals: dict[str, Any]
    """95% confidence intervals of some metrics: name -> (low, high) or None."""
    light_task: dict[str, Any]
    """Format of the inputs (task kind, columns, length); saved with it, empty if unknown."""

    def save_pretrained(self, save_directory: str | Path, *, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write a light adapter: PEFT's two files, `lightpeft.json` and a model card.

        If all weights trained (`light.train: all`), a further file holds them. If the vocabulary was reduced, a further
        file lists its tokens; embeddings are not written. PEFT's own loader refuses the folder if the base was cut
        (`hide_config`). The reference adapter of TRL's trainers is not written.

        Raises:
            LightPeftError: the model has other adapters, or the folder cannot be written (for example: disk full); no
                file is half-written.
        """
        require(kwargs.get("safe_serialization", True), "light adapters need safetensors; leave safe_serialization on")
        name = own_adapter(self)
        selected = kwargs.pop("selected_adapters", None) or [name]
        several = f"a light adapter holds one adapter; select {name} instead of {', '.join(selected)}"
        require(list(selected) == [name], several)
        if not is_main_process:
            return
        vocabulary = vocabulary_of(transformers_model(self))
        kwargs["save_embedding_layers"] = False  # PEFT takes resized embeddings for trained ones
        from lightpeft.saving.adapter_files import DESCRIPTION, FILES, write_beside
        from lightpeft.saving.description import facts_of
        from lightpeft.saving.kept_weights import write_kept

        with replacing_folder(save_directory, last=DESCRIPTION, obsolete=FILES) as temporary:
            super().save_pretrained(str(temporary), selected_adapters=[name], **kwargs)
            _move_up(temporary / name)
            if self.light_plan.train == "all":
                write_kept(self, temporary)
            write_beside(temporary, facts_of(self), self.light_plan, vocabulary)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Reduce the model as PEFT models are, with its class made anew, since no module holds it by name."""
        reduced: Any = super().__reduce_ex__(protocol)
        kind = vars(type(self)).get(_KIND)
        return reduced if kind is None else (_empty_light_model, (kind,), *reduced[2:])

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Refuse PEFT's way to load an adapter, which applies no plan; use `lightpeft.load_light`.

        Raises:
            LightPeftError: always.
        """
        raise LightPeftError("LightModel.from_pretrained applies no plan; use lightpeft.load_light(folder, base)")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: Token = None,
        commit_message: str | None = None,
        **options: Any,
    ) -> str:
        """Upload the light adapter to the hub, with the files of `save_pretrained`.

        Example:
            model.push_to_hub("owner/reviews-light", private=True)

        Args:
            repo_id: owner/name of a repository, which is created if it does not exist.
            private: visibility of a repository that is created; None: the default of the owner.
            revision: branch, which is created if it does not exist; None: the main branch.
            token: access token of an account with write access; None: the account that is logged in.
            commit_message: message of the commit.
            options: arguments of `save_pretrained`.

        Returns:
            URL of the commit.

        Raises:
            LightPeftError: the upload failed.
        """
        from lightpeft.saving.uploading import upload

        def write(folder: Path) -> None:
            self.save_pretrained(folder, **options)

        return upload(write, repo_id, private=private, revision=revision, token=token, commit_message=commit_message)

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load weights for the kept units with PEFT's `load_adapter`, such as those of a trainer's checkpoint.

        Raises:
            LightPeftError: the folder holds a light adapter with another plan.
        """
        from lightpeft.saving.adapter_files import DESCRIPTION, read_description
        from lightpeft.saving.kept_weights import read_kept

        folder = Path(model_id)
        if (folder / DESCRIPTION).is_file():
            with explain_content_errors(folder / DESCRIPTION):
                plan = PrunePlan.from_dict(read_description(folder)["plan"])
            other = f"{folder} is a light adapter with another plan; load it with lightpeft.load_light(folder)"
            require(plan == self.light_plan, other)
        loaded = super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
        if self.light_plan.train == "all":
            read_kept(self, folder, is_trainable=any(p.requires_grad for p in trained_weights(self).values()))
        return loaded

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Merge the PEFT weights with PEFT's `merge_and_unload`, and return the pruned transformers model.

        Its `save_pretrained` writes a folder for transformers' `from_pretrained` if the config of the family can
        describe the pruned layers, else one for `lightpeft.load_merged`.
        """
        return self._make_savable(self.base_model.merge_and_unload(*args, **kwargs))

    def unload(self) -> PreTrainedModel:
        """Remove the PEFT modules with PEFT's `unload`, and return the pruned base."""
        return self._make_savable(self.base_model.unload())

    def _make_savable(self, whole: PreTrainedModel) -> PreTrainedModel:
        from lightpeft.saving.description import facts_of, without_metrics
        from lightpeft.saving.whole import make_saveable

        make_saveable(whole, self.light_plan, without_metrics(facts_of(self)))
        return whole


_CLASSES: dict[type[PeftModel], type[LightModel]] = {}
"""PEFT class -> its light class."""


def _light_class(kind: type[PeftModel]) -> type[LightModel]:
    """Return the light class of a PEFT class (for sequence classification, causal LM, ...), one for each.

    It has the methods of `LightModel` before those of the PEFT class, and that one's name, by which transformers'
    pipelines know what they can take.
    """
    if kind not in _CLASSES:
        made = type(kind.__name__, (LightModel, kind), {"__doc__": kind.__doc__, _KIND: kind})
        _CLASSES[kind] = cast("type[LightModel]", made)
    return _CLASSES[kind]


def _empty_light_model(kind: type[PeftModel]) -> LightModel:
    """Return a light model without state, which `pickle` and `copy` fill."""
    light = _light_class(kind)
    return light.__new__(light)


def _move_up(folder: Path) -> None:
    """Move the files of an adapter with a name other than "default" from its subfolder to the parent folder."""
    if folder.is_dir():
        for file in folder.iterdir():
            file.replace(folder.parent / file.name)
        folder.rmdir()


def as_light(
    model: PeftModel,
    plan: PrunePlan,
    metrics: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    intervals: dict[str, Any] | None = None,
) -> LightModel:
    """Turn a pruned `PeftModel` into a `LightModel` in place, without changing its weights."""
    if not isinstance(model, LightModel):
        model.__class__ = _light_class(type(model))
    vars(model).pop("save_pretrained", None)  # that of a dense model with fewer tokens
    light = cast(LightModel, model)
    light.light_plan = plan
    light.light_metrics = dict(metrics or {})
    light.light_intervals = dict(intervals or {})
    light.light_task = dict(task or {})
    return light
