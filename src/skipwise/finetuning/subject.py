"""What a fine-tuning is to learn: pictures of a subject, and the text that each of them is trained under."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipwise.errors import UserError
from skipwise.finetuning.draws import Example
from skipwise.finetuning.images import Tell, check_prompt, has_word, read_pictures

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
        groups = [self._read(self.images, self._named(self.prompt), center_crop, resolution, tell)]
        self._check(groups[0])
        if self.class_images:
            prompt = self.class_prompt or " ".join(w for w in self._named(self.prompt).split() if w != self.token)
            groups.append(self._read(self.class_images, prompt, center_crop, resolution, tell, prior_weight))
            self._check_class(groups[1])
        for group in groups if tell else ():
            for example in group:
                tell(self._line(example, resolution, group is groups[0]))
        return groups

    def _read(
        self, folder: Path, prompt: str, center_crop: bool, resolution: int, tell: Tell | None, weight: float = 1.0
    ) -> list[Example]:
        pictures = read_pictures(folder, resolution, tell)
        bare = next((picture for picture in pictures if not picture.caption), None)
        if bare and not prompt.strip():
            raise UserError(
                f"{bare.path} has no caption; give --prompt, such as 'a photo of {self.token} dog', for those without."
            )
        texts = [self._named(picture.caption) if picture.caption else prompt for picture in pictures]
        if center_crop:
            pictures = [picture.squared() for picture in pictures]
        return [Example(picture, text, weight) for picture, text in zip(pictures, texts, strict=True)]

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
