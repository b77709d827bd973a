"""Prompts for calibration where the user gives none: the full-precision denoiser then makes its own data.

Varied on purpose, because activation ranges follow what is drawn: animals, people, places, things, styles, light and
dark, short and long, one empty (what classifier-free guidance contrasts with).
"""

from __future__ import annotations

PROMPTS = (
    "a red fox in the snow",
    "portrait of an old fisherman, soft window light",
    "a city street at night in the rain, neon signs",
    "bowl of fruit on a wooden table, oil painting",
    "an astronaut riding a bicycle on the moon",
    "a mountain lake at sunrise, mist over the water",
    "close-up of a green tree frog",
    "a child flying a kite on the beach",
    "isometric drawing of a tiny workshop full of tools",
    "a black cat asleep on a stack of books",
    "wide view of a desert under a dark sky full of stars",
    "a slice of chocolate cake on a white plate",
    "watercolour of a sailing boat in a storm",
    "a steam locomotive crossing a stone bridge",
    "two dancers on an empty stage, dramatic light",
    "sunflower",
    "a modern kitchen with large windows",
    "pencil sketch of a violin",
    "a crowded market with baskets of spices",
    "a robot watering plants in a greenhouse",
    "snow-covered village with smoke from the chimneys",
    "macro photograph of a drop of water on a leaf",
    "a knight in rusty armour sitting by a fire",
    "a plain grey cube on a white background",
    "colourful hot-air balloons over green hills",
    "an empty road leading into fog",
    "a stained-glass window with geometric patterns",
    "a flock of birds above a wheat field, late afternoon",
    "a vintage poster for a trip to the sea",
    "an owl looking straight into the camera",
    "a bright yellow taxi in front of a brick wall",
    "",
)
