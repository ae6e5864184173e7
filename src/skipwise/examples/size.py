"""How large one call of a model is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """How large one call is. Lengths that a model cannot take are rounded up to the next that it can.

    tokens: text length of a language model; of an encoder-decoder, the length that is decoded.
    image: side of the square latent image, in latent pixels (1024 pixels are 128 latent pixels in most models); an
    audio model's latents are as many steps long as the image has pixels.
    text: tokens that the model is conditioned on; unlike the number of image tokens, so that streams are told apart.
    frames: latent frames of a video model.
    batch: samples a call.
    """

    tokens: int = 8
    image: int = 8
    text: int = 5
    frames: int = 2
    batch: int = 1


TINY = Size()
