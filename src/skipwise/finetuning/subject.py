"""What a fine-tuning is to learn: pictures of a subject, and the text that each of them is trained under."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from skipwise.errors import UserError
from skipwise.finetuning.draws import Example
from skipwise.finetuning.images import Picture, Tell, check_prompt, has_word, read_pictures

TRIGGER = "[trigger]"  # what ai-toolkit's captions have in the place of the subject's word


@dataclass(frozen=True)
class Subject:
    """What is learnt: a folder of pictures and the prompt that names their subject by a rare word (DreamBooth).

    prompt: of pictures without a caption of their own. `[trigger]` in it and in captions stands for the token.
    class_images, class_prompt: pictures of other things of the subject's kind, and a prompt without the rare word, so
    that the model does not come to take all of the kind for the subject (prior preservation).
    """

    images: Path
    prompt: str
    token: str = "sks"
    class_images: Path | None = None
    class_prompt: str | None = None

    def examples(
        self, resolution: int, prior_weight: float = 1.0, center_crop: bool = False, tell: Tell | None = None
    ) -> list[list[Example]]:
        """Groups of examples, of which every batch takes some: the subject's, and those of its class if there are any.

        A picture's own caption goes before the prompt. center_crop: the centre of each picture alone, where otherwise
        crops are taken from everywhere. tell: is given a line on every picture: how it is resized, and its text.
        Raises UserError as `read_pictures` does, and for a token that is in no caption or in the prompt of the class.
        """
        prompt = self._named(self.prompt)
        pictures = self._pictures(self.images, prompt, "--prompt", resolution, tell)
        groups = [[Example(picture, self._text(picture, prompt)) for picture in pictures]]
        self._check(groups[0])
        if self.class_prompt and not self.class_images:
            raise UserError(f"The class's prompt {self.class_prompt!r} has no pictures; give --class-images too.")
        if self.class_images:
            prompt = self.class_prompt or " ".join(word for word in prompt.split() if word != self.token)
            pictures = self._pictures(self.class_images, prompt, "--class-prompt", resolution, tell)
            groups.append([Example(picture, self._text(picture, prompt), prior_weight) for picture in pictures])
            self._check_class(groups[1])
        if center_crop:
            groups = [[replace(e, picture=e.picture.squared()) for e in group] for group in groups]
        lines = [self._line(example, resolution, group is groups[0]) for group in groups for example in group]
        if tell:
            for line in lines:
                tell(line)
        return groups

    def _pictures(self, folder: Path, prompt: str, option: str, resolution: int, tell: Tell | None) -> list[Picture]:
        """Those of a folder. option: what gives the prompt of those without a caption."""
        pictures = read_pictures(folder, resolution, tell)
        bare = next((picture for picture in pictures if not picture.caption), None)
        if bare and not prompt.strip():
            raise UserError(f"{bare.path} has no caption; write one beside it, or give {option} for those without.")
        return pictures

    def _text(self, picture: Picture, prompt: str) -> str:
        return self._named(picture.caption) if picture.caption else prompt

    def _named(self, text: str) -> str:
        return text.replace(TRIGGER, self.token)

    def _check(self, examples: Sequence[Example]) -> None:
        """Raise UserError unless the prompt, where there is one, and some caption, where there are any, name the
        subject.
        """
        if self.prompt.strip() or not self.token.strip():
            check_prompt(self._named(self.prompt), self.token)
        captions = [example.prompt for example in examples if example.picture.caption]
        if captions and not any(has_word(caption, self.token) for caption in captions):
            raise UserError(
                f"None of the {len(captions)} captions in {self.images} has the subject token {self.token!r}, the "
                f"first is {captions[0]!r}; write it, or {TRIGGER}, where they name the subject, or give a word of "
                "theirs as --subject."
            )

    def _check_class(self, examples: Sequence[Example]) -> None:
        wrong = next((example.prompt for example in examples if has_word(example.prompt, self.token)), None)
        if wrong is not None:
            raise UserError(
                f"The class's prompt {wrong!r} has the subject token {self.token!r}, which its pictures do not show; "
                "give --class-prompt without it."
            )

    def _line(self, example: Example, resolution: int, of_subject: bool) -> str:
        picture = example.picture
        said = f'"{" ".join(example.prompt.split())}" ({picture.caption_file or "the prompt"})'
        lacks = of_subject and not has_word(example.prompt, self.token)
        hint = f", which does not name the subject {self.token!r}" if lacks else ""
        return f"{picture.path.name}: {picture.resized(resolution)}; {said}{hint}"
