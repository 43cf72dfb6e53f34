"""The live light model: a pruned `PeftModel` that knows its plan and saves itself with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from lightpeft.errors import LightPeftError, require
from lightpeft.files import replacing_folder, understandable
from lightpeft.models.all_weights import trained_weights
from lightpeft.models.repositories import Token
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary.cutting import vocabulary_of
from lightpeft.peft_kinds.sites.registry import own_adapter
from lightpeft.plans.records import PrunePlan


class LightModel(PeftModel):
    """A pruned `PeftModel`. It trains, generates and merges as one; `save_pretrained` writes a light adapter."""

    light_plan: PrunePlan
    """Which units of the dense base are here."""
    light_metrics: dict[str, Any]
    """What was measured of this model; saved with it."""
    light_intervals: dict[str, Any]
    """95% intervals of some of that: name -> (low, high) or None."""
    light_task: dict[str, Any]
    """How inputs are read (task kind, columns, length); saved with it, empty if unknown."""

    def save_pretrained(self, save_directory: str | Path, *, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write a light adapter: PEFT's own two files, `lightpeft.json` and a model card.

        Where all weights trained (`light.train: all`), these too, in a file of their own.
        Of a model with fewer tokens, also which these are; no embeddings. Where anything of the base is cut, PEFT's own
        loader refuses the folder (`sites.hide_config`). The reference of one of TRL's trainers, beside the adapter, is
        not written.

        Raises:
            LightPeftError: there are other adapters, or the folder cannot be written (for example: disk full); no file
                is half-written.
        """
        require(kwargs.get("safe_serialization", True), "a light adapter is written as safetensors, never as pickle")
        name = own_adapter(self)
        selected = kwargs.pop("selected_adapters", None) or [name]
        several = f"a light adapter has one adapter, {name}; it cannot be saved with {', '.join(selected)}"
        require(list(selected) == [name], several)
        if not is_main_process:
            return
        vocabulary = vocabulary_of(transformers_model(self))
        if vocabulary is not None:
            kwargs["save_embedding_layers"] = False  # PEFT takes them for trained, as there are fewer than in the base
        from lightpeft.saving.adapter_files import DESCRIPTION, FILES, write_beside
        from lightpeft.saving.description import facts_of
        from lightpeft.saving.kept_weights import write_kept

        with replacing_folder(save_directory, last=DESCRIPTION, obsolete=FILES) as temporary:
            super().save_pretrained(str(temporary), selected_adapters=[name], **kwargs)
            _move_up(temporary / name)
            if self.light_plan.train == "all":
                write_kept(self, temporary)
            write_beside(temporary, facts_of(self), self.light_plan, vocabulary)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """PEFT's way to load an adapter, which knows no plan.

        Raises:
            LightPeftError: always; it names the function that loads a light adapter.
        """
        raise LightPeftError("LightModel.from_pretrained knows no plan; use lightpeft.load_light(folder, base)")

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
        """Send the light adapter, as `save_pretrained` writes it, to the hub.

        Args:
            repo_id: owner/name of a repository, which is made if it is not there.
            private: whether one that is made is to be read by its owner alone; None: as the owner's usual.
            revision: branch, which is made if it is not there; None: the main branch.
            token: of an account that may write there; None: the one that is logged in.
            commit_message: says what is new.
            options: of `save_pretrained`.

        Returns:
            Where the commit is.

        Raises:
            LightPeftError: it cannot be sent.
        """
        from lightpeft.saving.uploading import upload

        def write(folder: Path) -> None:
            self.save_pretrained(folder, **options)

        return upload(write, repo_id, private=private, revision=revision, token=token, commit_message=commit_message)

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `load_adapter`, of weights for the units that are here, as in a trainer's checkpoint of this model.

        Raises:
            LightPeftError: they are a light adapter's with another plan.
        """
        from lightpeft.saving.adapter_files import DESCRIPTION, read_description
        from lightpeft.saving.kept_weights import read_kept

        folder = Path(model_id)
        if (folder / DESCRIPTION).is_file():
            with understandable(folder / DESCRIPTION):
                plan = PrunePlan.from_dict(read_description(folder)["plan"])
            other = f"{folder} is for other units of the base than are here; load_light(folder) gives its own"
            require(plan == self.light_plan, other)
        loaded = super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
        if self.light_plan.train == "all":
            read_kept(self, folder, is_trainable=any(p.requires_grad for p in trained_weights(self).values()))
        return loaded

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """PEFT's `merge_and_unload`: a plain transformers model, pruned, that saves itself so that it can be loaded.

        If its layers are all equally wide and its config can say so, by transformers; else by `load_merged`.
        """
        return self._settled(self.base_model.merge_and_unload(*args, **kwargs))

    def unload(self) -> PreTrainedModel:
        """PEFT's `unload`: the same without the adapter, the pruned base alone."""
        return self._settled(self.base_model.unload())

    def _settled(self, whole: PreTrainedModel) -> PreTrainedModel:
        from lightpeft.saving.description import facts_of, without_metrics
        from lightpeft.saving.whole import make_saveable

        make_saveable(whole, self.light_plan, without_metrics(facts_of(self)))
        return whole


def _move_up(folder: Path) -> None:
    """Move the files of an adapter that is not called "default" to where PEFT writes those of one that is."""
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
    """Make a pruned `PeftModel` one that saves itself as a light adapter; same object, same weights."""
    kind = type(model)
    if not issubclass(kind, LightModel):
        # the model keeps its own class (for sequence classification, causal LM, ...) with `save_pretrained` before it,
        # and that one's name, by which transformers' pipelines know what they can take
        model.__class__ = type(kind.__name__, (LightModel, kind), {"__doc__": kind.__doc__})
    vars(model).pop("save_pretrained", None)  # that of a dense model with fewer tokens
    light = cast(LightModel, model)
    light.light_plan = plan
    light.light_metrics = dict(metrics or {})
    light.light_intervals = dict(intervals or {})
    light.light_task = dict(task or {})
    return light
