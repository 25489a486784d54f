"""What the base model is taught to paint, and what is kept from it.

A noun is written as captions write it.  ``LABELS`` gives the emojibase label of a noun where the
two differ.  ``HELD_OUT`` nouns are in no training caption and no training picture, so that
personalization can be measured on classes the base has never seen.
"""

import random

STYLES: dict[str, str] = {
    "fluent": "a 3d render of",
    "noto": "a painting of",
    "twemoji": "a flat icon of",
}

_TRAINING = """
monkey gorilla orangutan dog poodle wolf fox raccoon cat lion tiger leopard moose donkey horse
unicorn zebra deer bison cow pig boar ram goat camel giraffe elephant mammoth rhinoceros
hippopotamus mouse rat hamster rabbit beaver hedgehog bat bear koala panda sloth otter skunk
kangaroo badger rooster bird penguin eagle duck swan owl dodo flamingo peacock parrot frog
crocodile turtle lizard snake dragon whale dolphin seal fish shark octopus crab lobster shrimp
squid snail butterfly ant bee beetle ladybug cricket scorpion
bouquet rose hibiscus sunflower tulip seedling cactus palm_tree pine_tree mushroom
grapes melon watermelon orange lemon banana pineapple mango apple pear peach cherries strawberry
blueberries kiwi tomato coconut avocado eggplant potato carrot corn pepper cucumber broccoli
garlic onion bread croissant baguette pretzel bagel pancakes waffle cheese bacon hamburger fries
pizza hotdog sandwich taco burrito egg popcorn sushi dumpling ice_cream doughnut cookie cake
cupcake pie chocolate candy lollipop teapot
volcano hut house castle church tent fountain locomotive train tram bus ambulance fire_engine
police_car taxi car truck tractor scooter bicycle skateboard sailboat canoe speedboat ship
airplane helicopter rocket
balloon gift trophy basketball football kite teddy_bear umbrella snowman crown hat backpack shoe
boot dress glasses ring diamond bell guitar violin trumpet drum telephone laptop television
camera candle book key hammer axe bomb magnet chair clock robot
"""

_HELD_OUT = """
ox llama ewe goose turkey chick dinosaur jellyfish oyster worm fly mosquito cockroach feather
coral lotus clover leaf chestnut peanuts olive pea_pod ginger pot jar spoon honey salt butter
rice_ball spaghetti bento popsicle custard hospital hotel factory mosque carousel ferris_wheel
monorail anchor parachute satellite hourglass watch fireworks medal baseball tennis_ball skis
sled yo-yo magic_wand yarn scarf gloves socks shorts purse lipstick headphones microphone radio
saxophone accordion banjo flute battery flashlight scroll newspaper envelope briefcase paperclip
ruler wrench screwdriver ladder microscope telescope syringe pill door toilet broom bucket sponge
"""

LABELS: dict[str, str] = {
    "bee": "honeybee",
    "ladybug": "lady beetle",
    "pine tree": "evergreen tree",
    "orange": "tangerine",
    "apple": "red apple",
    "kiwi": "kiwi fruit",
    "corn": "ear of corn",
    "pepper": "bell pepper",
    "baguette": "baguette bread",
    "cheese": "cheese wedge",
    "fries": "french fries",
    "hotdog": "hot dog",
    "ice cream": "soft ice cream",
    "cake": "birthday cake",
    "chocolate": "chocolate bar",
    "car": "automobile",
    "truck": "delivery truck",
    "scooter": "motor scooter",
    "train": "metro",
    "gift": "wrapped gift",
    "football": "american football",
    "snowman": "snowman without snow",
    "hat": "top hat",
    "shoe": "running shoe",
    "boot": "woman’s boot",
    "diamond": "gem stone",
    "book": "closed book",
    "clock": "alarm clock",
    "chick": "baby chick",
    "dinosaur": "sauropod",
    "clover": "four leaf clover",
    "leaf": "maple leaf",
    "ginger": "ginger root",
    "pot": "pot of food",
    "honey": "honey pot",
    "bento": "bento box",
    "rice ball": "rice ball",
    "popsicle": "shaved ice",
    "carousel": "carousel horse",
    "satellite": "satellite antenna",
    "hourglass": "hourglass done",
    "medal": "sports medal",
    "tennis ball": "tennis",
    "headphones": "headphone",
    "envelope": "envelope with arrow",
    "ruler": "straight ruler",
    "tulip": "tulip",
}


def training_nouns() -> list[str]:
    """The nouns of the training captions, in a fixed order."""
    return [word.replace("_", " ") for word in _TRAINING.split()]


def held_out_nouns() -> list[str]:
    """The nouns that training never meets, in a fixed order."""
    return [word.replace("_", " ") for word in _HELD_OUT.split()]


def label(noun: str) -> str:
    """The emojibase label whose art shows ``noun``."""
    return LABELS.get(noun, noun)


def held_out_pairs(nouns: list[str], seed: int = 0) -> set[tuple[str, str]]:
    """One (noun, style) per noun that training never shows together.

    The styles take turns over a shuffled list, so that each style loses a third of the nouns and
    every noun keeps two styles to be learnt from.
    """
    order = sorted(nouns)
    random.Random(seed).shuffle(order)
    styles = list(STYLES)
    return {(noun, styles[i % len(styles)]) for i, noun in enumerate(order)}
