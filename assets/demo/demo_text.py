"""The demo's text: plain English for pre-training, and restaurant descriptions from slots for fine-tuning.

Everything is generated from word lists and sentence frames in this file by a seeded random generator. Pre-training
paragraphs mention invented names and details and come back to them later, so a model has a reason to learn to
look back and copy; they never use the `slot: value; slot: value` notation. The names of places are dealt out: none is
used for a place in two of the pre-training text, the training, validation and test lines (a landmark such as a bridge
may happen to be called what a restaurant is called elsewhere).
"""

import random

# ---------------------------------------------------------------------------------------------- words

NAME_FIRST = (
    "Copper Silver Golden Blue Green Red White Black Amber Crimson Ivory Velvet Iron Stone Wooden Painted Quiet "
    "Merry Lucky Hungry Gentle Sleepy Wandering Hidden Little Tall Crooked Broken Bright Misty Sunny Snowy Windy "
    "Salty Dusty Mossy Rusty Royal Humble Noble"
).split()
NAME_SECOND = (
    "Heron Otter Fox Badger Lantern Kettle Anchor Barrel Wheel Feather Sparrow Raven Swan Trout Salmon Hare Stag "
    "Bear Wolf Owl Thimble Candle Spoon Ladle Pepper Clover Thistle Willow Maple Acorn Orchard Harvest Meadow "
    "Garden Bridge Tower Gate Compass Button Whistle Drum Fiddle Bell Crown Shield Boot Basket Hammer Saddle Pear"
).split()
SYLLABLE_FIRST = "Bel Tar Vel Mor Kes Lun Dor Fen Gar Hal Jor Kal Lor Mar Nel Or Pel Quin Ros Sel Tul Ul Ver Wil Yar Zan".split()
SYLLABLE_MIDDLE = "a e i o u an en il or ar".split()
SYLLABLE_LAST = "mora dale ton wick ford nik ra len bury stead lia mond rin vale by sa tra nor".split()
PEOPLE = (
    "Anna Ben Clara David Ella Felix Grace Hugo Iris Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor Wendy "
    "Adam Bella Carl Dora Emil Flora George Hanna Ivan Julia Karl Laura Max Nina Oscar Petra Robin Sara Tom"
).split()
LANDMARKS = (
    "Bridge Mill Theatre Station Library Museum Chapel Market Park School Fountain Tower Harbour Garden Hall "
    "Cinema Castle Stadium Bank Pier"
).split()

FOODS = (
    "fish soup,lamb stew,apple cake,rice and beans,roast chicken,fresh bread,mushroom pie,hot noodles,sweet pancakes,"
    "grilled trout,goat cheese,steamed dumplings,plum tart,bean curry,smoked ham,potato salad,tomato pasta,beef pie,"
    "onion soup,fried rice,honey cake,baked cod,corn bread,pumpkin soup,spicy sausages,lemon chicken"
).split(",")
KINDS = "tea room,inn,bakery,grill house,wine bar,noodle bar,food hall,kitchen,tavern,pie shop".split(",")
AREAS = {
    "riverside": "by the riverside",
    "old town": "in the old town",
    "hilltop": "on the hilltop",
    "harbour": "at the harbour",
    "market square": "on the market square",
    "city centre": "in the city centre",
    "station quarter": "in the station quarter",
    "village": "in the village",
}
GOODS = (
    "lamps,ropes,maps,clocks,hats,boots,blankets,candles,baskets,chairs,knives,bottles,ribbons,toys,books,brushes,"
    "nails,buckets,plates,cups,carpets,bells,kites,paper,paint,soap,wool,seeds,tools,pots"
).split(",")
FRUITS = "apples,pears,plums,cherries,grapes,lemons,onions,carrots,beans,potatoes,tomatoes,nuts,eggs,berries".split(",")
ANIMALS = "dog,cat,horse,goat,rabbit,duck,parrot,donkey,pony,turtle,goose,sheep,mouse,hen".split(",")
COLOURS = "red,blue,green,yellow,white,black,brown,grey,orange,purple".split(",")
JOBS = (
    "baker,teacher,farmer,nurse,driver,painter,sailor,tailor,doctor,gardener,cook,carpenter,writer,singer,builder,"
    "fisherman,clerk,postman,barber,miller"
).split(",")
WORKPLACES = {
    "baker": "bakes bread",
    "teacher": "teaches children",
    "farmer": "works in the fields",
    "nurse": "looks after sick people",
    "driver": "drives a bus",
    "painter": "paints houses",
    "sailor": "sails on ships",
    "tailor": "makes coats",
    "doctor": "helps people who are ill",
    "gardener": "grows flowers",
    "cook": "cooks meals",
    "carpenter": "builds tables and chairs",
    "writer": "writes stories",
    "singer": "sings in a choir",
    "builder": "builds walls",
    "fisherman": "catches fish",
    "clerk": "works in an office",
    "postman": "brings letters",
    "barber": "cuts hair",
    "miller": "makes flour",
}
HOBBIES = (
    "reading,swimming,singing,cooking,drawing,fishing,dancing,walking in the hills,playing chess,riding a bicycle,"
    "growing roses,telling stories,baking cakes,playing the drum,making boats,looking at the stars"
).split(",")
WEATHER = "sunny,rainy,windy,cloudy,cold,warm,foggy,snowy,stormy,mild".split(",")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = "spring summer autumn winter".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
ROOMS = "kitchen,bedroom,garden,cellar,hall,attic,bathroom,workshop".split(",")
THINGS = "key,letter,book,ring,coat,lamp,map,ticket,basket,umbrella,violin,box,coin,hat".split(",")


def article(word):
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def capital(text):
    return text[0].upper() + text[1:]


def was(noun):
    return "were" if noun.endswith("s") else "was"


def listing(items):
    items = list(items)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# ---------------------------------------------------------------------------------------------- names

PARTS = ("pretrain", "train", "valid", "test")


def name_pools(seed):
    """Two-word names and invented words, shuffled and dealt to the four parts without overlap."""
    deal = random.Random(seed)
    pairs = [f"{first} {second}" for first in NAME_FIRST for second in NAME_SECOND]
    words = [a + b + c for a in SYLLABLE_FIRST for b in SYLLABLE_MIDDLE for c in SYLLABLE_LAST]
    pools = {part: [] for part in PARTS}
    for names in (pairs, words):
        deal.shuffle(names)
        ends = [0, int(0.6 * len(names)), int(0.9 * len(names)), int(0.95 * len(names)), len(names)]
        for part, start, end in zip(PARTS, ends, ends[1:]):
            pools[part].append(names[start:end])
    return pools


class Names:
    """Draws invented names of places from one part's pool."""

    def __init__(self, pools, part, rng):
        self.pairs, self.words = pools[part]
        self.rng = rng

    def place(self):
        draw = self.rng.random()
        if draw < 0.55:
            return self.rng.choice(self.pairs)
        if draw < 0.75:
            return "The " + self.rng.choice(self.pairs)
        return self.rng.choice(self.words)

    def town(self):
        return self.rng.choice(self.words)

    def landmark(self):
        draw = self.rng.random()
        if draw < 0.5:
            return f"{self.rng.choice(self.words)} {self.rng.choice(LANDMARKS)}"
        if draw < 0.8:
            return f"{self.rng.choice(NAME_FIRST)} {self.rng.choice(LANDMARKS)}"
        return self.rng.choice(self.pairs)


# ---------------------------------------------------------------------------------------------- plain English


class Paragraphs:
    """Plain English paragraphs on everyday subjects."""

    def __init__(self, names, rng):
        self.names = names
        self.rng = rng
        self.kinds = [
            (self.place_notes, 6),
            (self.place_questions, 3),
            (self.place_letter, 2),
            (self.person, 3),
            (self.people_compared, 2),
            (self.shopping, 2),
            (self.market, 2),
            (self.repeated_message, 7),
            (self.lost_thing, 1),
            (self.river, 1),
            (self.weather, 1),
            (self.meal, 2),
            (self.recipe, 1),
            (self.journey, 2),
            (self.animal, 1),
            (self.house, 1),
            (self.work, 1),
            (self.opinions, 2),
            (self.introductions, 1),
            (self.meanings, 1),
            (self.area, 1),
            (self.manners, 1),
        ]

    def one(self):
        makers = [maker for maker, _ in self.kinds]
        weights = [weight for _, weight in self.kinds]
        return self.rng.choices(makers, weights)[0]()

    def pick(self, *options):
        return self.rng.choice(options)

    def of(self, items):
        return self.rng.choice(list(items))

    def some(self, items, low, high):
        return self.rng.sample(list(items), self.rng.randint(low, high))

    # A place, its details in one order and then again in another.

    def details(self):
        rng, of = self.rng, self.of
        shop = rng.random() < 0.35
        return dict(
            name=self.names.place(),
            kind=of(["shop", "market stall", "store", "workshop"]) if shop else of(KINDS + ["farm", "hotel", "club"]),
            sells=listing(self.some(GOODS, 1, 2)) if shop else of(FOODS),
            price=of(["cheap", "moderate", "expensive", "fair", f"{rng.randint(3, 60)} crowns", f"{rng.randint(3, 60)} coins"]),
            where=of(list(AREAS.values()) + ["by the river", "on top of the hill", "near the sea", "behind the church", "at the edge of town"]),
            beside=self.names.landmark(),
            opinion=of(["excellent", "good", "average", "poor"]),
            children=rng.random() < 0.5,
            town=self.names.town(),
            owner=of(PEOPLE),
        )

    def fact(self, d, key, subject):
        pick, number = self.pick, d["price"][0].isdigit()
        s = capital(subject)
        if key == "sells":
            return pick(
                f"{s} sells {d['sells']}.",
                f"{s} is known for {d['sells']}.",
                f"People go there for {d['sells']}.",
                f"You can buy {d['sells']} there.",
                f"{s} offers {d['sells']}.",
            )
        if key == "kind":
            return pick(f"{s} is {article(d['kind'])}.", f"It is {article(d['kind'])}.", f"{s} has been {article(d['kind'])} for years.")
        if key == "price":
            if number:
                return pick(f"You pay {d['price']} there.", f"{s} charges {d['price']}.", f"The usual price is {d['price']}.", f"Bring {d['price']}.")
            return pick(f"The prices are {d['price']}.", f"Most people find it {d['price']}.", f"{s} has {d['price']} prices.")
        if key == "where":
            return pick(f"{s} stands {d['where']}.", f"{s} is {d['where']}.", f"You will see it {d['where']}.", f"It lies {d['where']}.")
        if key == "beside":
            return pick(
                f"{s} is next to {d['beside']}.",
                f"{s} is close to {d['beside']}.",
                f"Look for {d['beside']} and you are there.",
                f"It is only a short walk from {d['beside']}.",
                f"{d['beside']} is right beside it.",
            )
        if key == "opinion":
            return pick(
                f"Customers say it is {d['opinion']}.",
                f"Most guests call it {d['opinion']}.",
                f"The service is {d['opinion']}.",
                f"People think {subject} is {d['opinion']}.",
            )
        if key == "children":
            if d["children"]:
                return pick("Children are welcome.", "Families with children like it.", "It is a good place for families.", "Parents bring their children.")
            return pick("Children are not welcome.", "It is for adults only.", "It is not a place for families.", "Nobody brings children.")
        if key == "town":
            return pick(f"{s} is in {d['town']}.", f"The town is called {d['town']}.", f"It belongs to the town of {d['town']}.")
        return pick(f"{d['owner']} owns {subject}.", f"The owner is {d['owner']}.", f"{s} belongs to {d['owner']}.")

    KEYS = ["sells", "kind", "price", "where", "beside", "opinion", "children", "town", "owner"]

    def subject(self, d):
        return self.pick(d["name"], d["name"], "it", "the place")

    def place_notes(self):
        d = self.details()
        pick, name = self.pick, d["name"]
        opening = pick(
            f"I want to tell you about {name}.",
            f"There is a place called {name}.",
            f"Everyone in {d['town']} knows {name}.",
            f"Yesterday we visited {name}.",
            f"My sister wrote to me about {name}.",
            f"Have you heard of {name}?",
            f"The name of the place is {name}.",
            f"These are my notes on {name}.",
        )
        keys = self.some(self.KEYS, 2, 6)
        text = [opening] + [self.fact(d, key, self.subject(d)) for key in keys]
        if self.rng.random() < 0.75:
            again = self.some(keys, 1, len(keys))
            text.append(pick("In short,", "So remember,", "To say it again,", "As I said,", "Once more,", "In other words,"))
            first = self.fact(d, again[0], name)
            if not first.startswith(name) and first.startswith(("People", "Children", "Customers", "Most", "The ", "You", "Look", "Families", "It ", "Parents", "Nobody", "Bring")):
                first = first[0].lower() + first[1:]
            text.append(first)
            text += [self.fact(d, key, self.subject(d)) for key in again[1:]]
        if self.rng.random() < 0.4:
            text.append(pick(f"I like {name}.", f"We will go to {name} again.", f"That is all about {name}.", f"Ask for {name}.", f"Do not forget {name}."))
        return " ".join(text)

    def place_questions(self):
        d = self.details()
        pick, name = self.pick, d["name"]
        keys = self.some(self.KEYS, 2, 5)
        text = [self.fact(d, keys[0], name)] + [self.fact(d, key, self.subject(d)) for key in keys[1:]]
        number = d["price"][0].isdigit()
        questions = {
            "sells": (f"What does {name} sell?", f"{name} sells {d['sells']}."),
            "kind": (f"What is {name}?", f"{name} is {article(d['kind'])}."),
            "price": (
                (f"How much do I pay at {name}?", f"You pay {d['price']}.")
                if number
                else (f"What are the prices at {name}?", f"The prices are {d['price']}.")
            ),
            "where": (f"Where is {name}?", f"{name} is {d['where']}."),
            "beside": (f"What is next to {name}?", f"{d['beside']} is next to {name}."),
            "opinion": (f"What do customers say about {name}?", f"They say it is {d['opinion']}."),
            "children": (f"Can I bring children to {name}?", "Yes, children are welcome." if d["children"] else "No, it is for adults only."),
            "town": (f"In which town is {name}?", f"{name} is in {d['town']}."),
            "owner": (f"Who owns {name}?", f"{d['owner']} owns {name}."),
        }
        for key in self.some(keys, 1, min(3, len(keys))):
            question, answer = questions[key]
            text += [question, pick(answer, answer, "I can tell you. " + answer)]
        return " ".join(text)

    def place_letter(self):
        d = self.details()
        writer, reader = self.some(PEOPLE, 2, 2)
        keys = self.some(self.KEYS, 2, 4)
        pick = self.pick
        middle = " ".join(self.fact(d, key, self.subject(d)) for key in keys)
        return pick(
            f"Dear {reader}, we have found a lovely place. It is called {d['name']}. {middle} Will you come to {d['name']} with us? Your friend {writer}",
            f"Dear {reader}, you asked me about {d['name']}. {middle} So {d['name']} is worth a visit. Love, {writer}",
            f"Dear {reader}, do not go to {d['name']}. {middle} I did not enjoy {d['name']}. Yours, {writer}",
        )

    # People, things and messages that come back.

    def person(self):
        pick = self.pick
        name = self.of(PEOPLE)
        woman = name[-1] in "ae" or name in ("Iris", "Wendy", "Kate", "Grace")
        she, her = ("she", "her") if woman else ("he", "his")
        job, town, pet, colour, hobby = self.of(JOBS), self.names.town(), self.of(ANIMALS), self.of(COLOURS), self.of(HOBBIES)
        pet_name = self.names.town()
        text = [
            pick(f"{name} lives in {town}.", f"{name} comes from {town}.", f"{name} was born in {town}."),
            pick(f"{capital(she)} is {article(job)}.", f"{capital(she)} works as {article(job)}."),
        ]
        more = [
            pick(f"{capital(she)} {WORKPLACES[job]} every day.", f"Like every {job}, {she} {WORKPLACES[job]}."),
            f"{capital(she)} has {article(colour)} {pet} called {pet_name}.",
            pick(f"{capital(she)} likes {hobby}.", f"In the evening {she} enjoys {hobby}."),
            f"{capital(her)} house is {self.of(COLOURS)} and has {self.of(NUMBERS)} rooms.",
            f"{capital(she)} is {self.rng.randint(18, 80)} years old.",
            f"{capital(her)} friends are {listing(self.some(PEOPLE, 2, 3))}.",
        ]
        text += self.rng.sample(more, self.rng.randint(2, 4))
        if any(pet_name in line for line in text) and self.rng.random() < 0.8:
            text.append(pick(f"{pet_name} is a good {pet}.", f"{name} feeds {pet_name} every morning.", f"Everybody in {town} loves {pet_name}."))
        text.append(pick(f"{name} is happy in {town}.", f"Most people in {town} know {name}.", f"{name} would never leave {town}."))
        return " ".join(text)

    def people_compared(self):
        a, b = self.some(PEOPLE, 2, 2)
        kind = self.rng.randrange(4)
        if kind == 0:
            x, y = self.some(FRUITS + GOODS, 2, 2)
            return f"{a} has {x} and {b} has {y}. {a} gives the {x} to {b}. Now {b} has the {x} and the {y}, and {a} has nothing."
        if kind == 1:
            x, y = self.some(JOBS, 2, 2)
            return f"{a} is {article(x)} and {b} is {article(y)}. {a} {WORKPLACES[x]}. {b} {WORKPLACES[y]}. The {x} and the {y} are friends."
        if kind == 2:
            x, y = sorted(self.rng.sample(range(5, 90), 2))
            return f"{a} is {x} years old. {b} is {y} years old. So {b} is older than {a}, and {a} is younger than {b}."
        x, y = self.names.town(), self.names.town()
        return f"{a} went to {x} and {b} went to {y}. {a} liked {x} very much. {b} did not like {y}. Next year {b} will go to {x} too."

    def shopping(self):
        pick, name = self.pick, self.of(PEOPLE)
        things = self.some(GOODS + FRUITS, 2, 5)
        again = list(things)
        if self.rng.random() < 0.4:
            self.rng.shuffle(again)
        return pick(
            f"{name} went to the shop to buy {listing(things)}. At home {name} put the {listing(again)} on the table.",
            f"Please bring {listing(things)}. {name} read the list twice: {listing(things)}. Then {name} went out and bought {listing(again)}.",
            f"In the box there were {listing(things)}. {name} took out the {again[0]}. After that, only {listing(again[1:])} were left.",
            f"The list was short: {listing(things)}. {name} found the {listing(again)} and came home.",
        )

    def market(self):
        fruits = self.some(FRUITS, 2, 4)
        coins = self.rng.sample(range(2, 40), len(fruits))
        town = self.names.town()
        text = [self.pick(f"It is market day in {town}.", f"The market of {town} opens early.", f"We went to the market in {town}.")]
        text += [f"The {fruit} cost {price} coins." for fruit, price in zip(fruits, coins)]
        i = self.rng.randrange(len(fruits))
        name = self.of(PEOPLE)
        text.append(self.pick(f"How much are the {fruits[i]}? They cost {coins[i]} coins.", f"{name} pays {coins[i]} coins for the {fruits[i]}."))
        high = max(range(len(fruits)), key=lambda k: coins[k])
        if self.rng.random() < 0.5:
            text.append(f"The {fruits[high]} were the most expensive at {coins[high]} coins.")
        text.append(self.pick(f"Then the market in {town} closes.", "What a busy morning!", "Everyone goes home with a full basket."))
        return " ".join(text)

    def repeated_message(self):
        """Words without much sense of their own: only looking back says what comes next."""
        pool = self.names
        words = [self.pick(pool.place(), pool.landmark(), self.of(FOODS), self.of(GOODS), self.of(PEOPLE), pool.town()) for _ in range(self.rng.randint(2, 5))]
        line = ", ".join(words)
        kind = self.rng.randrange(4)
        if kind == 0:
            return f"The sign said {line}. I read it again: {line}."
        if kind == 1:
            return f"She called out {line}. Nobody heard her, so she called again: {line}. Then everyone heard {words[-1]}."
        if kind == 2:
            a, b = self.some(PEOPLE, 2, 2)
            return f"{a} wrote down {line}. {b} copied what {a} wrote: {line}."
        return f"Remember these words: {line}. What were the words? They were {line}."

    def lost_thing(self):
        a, b = self.some(PEOPLE, 2, 2)
        thing, colour, room = self.of(THINGS), self.of(COLOURS), self.of(ROOMS)
        return self.pick(
            f"{a} has lost {article(colour)} {thing}. Is the {thing} in the {room}? Yes, {b} finds the {colour} {thing} in the {room}. Thank you, {b}!",
            f"There is {article(thing)} in the {room}. It is {colour} and old. {b} asks: whose {thing} is this? The {colour} {thing} belongs to {a}.",
        )

    # Scenes.

    def river(self):
        name, town, other = self.names.town(), self.names.town(), self.names.town()
        return " ".join(
            [
                self.pick(f"The river {name} begins in the hills.", f"The {name} is a long river.", f"A river called {name} runs through the valley."),
                self.pick(f"It flows past {town} and then past {other}.", f"It comes down to {town} and goes on to {other}."),
                self.pick("In spring the water is high and cold.", "In summer the water is low and clear.", "Many trout live in the clear water."),
                self.pick(f"Children from {town} swim in the {name}.", f"The people of {other} cross the {name} by boat.", f"An old bridge crosses the {name} at {town}."),
                self.pick("At last the river reaches the sea.", f"Nobody knows how deep the {name} is.", "Willows grow along the banks."),
            ]
        )

    def weather(self):
        day, now, then = self.of(DAYS), *self.some(WEATHER, 2, 2)
        town = self.names.town()
        return " ".join(
            [
                f"On {day} it was {now} in {town}.",
                self.pick("We stayed at home and played.", "The children walked to school.", "The streets were empty.", "The farmers were glad."),
                f"In the evening the weather changed and it became {then}.",
                self.pick(f"It was a {now} morning and a {then} night.", f"After {article(now)} day came {article(then)} night."),
                self.pick(f"{capital(self.of(SEASONS))} in {town} is often like that.", f"Nobody in {town} was surprised."),
            ]
        )

    def meal(self):
        name, food, second, day = self.of(PEOPLE), *self.some(FOODS, 2, 2), self.of(DAYS)
        guests = self.some([p for p in PEOPLE if p != name], 2, 3)
        return " ".join(
            [
                self.pick(f"On {day} {name} cooked for the family.", f"{name} invited {listing(guests)} to dinner on {day}."),
                self.pick(f"They had {food} and {second}.", f"The table was set with {food} and {second}."),
                self.pick(f"{guests[0]} ate the {food}.", f"{guests[0]} wanted more {food}.", f"The {food} {was(food)} hot and very good."),
                self.pick(f"{guests[1]} ate the {second}.", f"{guests[1]} did not like the {second}.", f"The {second} tasted of butter and salt."),
                self.pick(f"Everyone thanked {name}.", f"Next {day} there will be {food} again.", f"In the end the {food} and the {second} were gone."),
            ]
        )

    def recipe(self):
        food = self.of(FOODS)
        parts = self.some("butter,salt,flour,milk,sugar,pepper,oil,water,cream,garlic,rice,honey".split(","), 2, 4)
        return " ".join(
            [
                self.pick(f"To make {food} you need {listing(parts)}.", f"This is how my mother makes {food}. She takes {listing(parts)}."),
                f"Put the {parts[0]} in a large bowl and add the {parts[1]}.",
                *[f"Then add the {part}." for part in parts[2:]],
                self.pick("Mix everything well.", "Cook it slowly over a small fire.", f"Wait {self.of(NUMBERS)} minutes."),
                self.pick(f"Serve the {food} hot.", f"The {food} {'are' if was(food) == 'were' else 'is'} ready.", f"Now you can eat {food} with your friends."),
            ]
        )

    def journey(self):
        a = self.of(PEOPLE)
        x, y, mark = self.names.town(), self.names.town(), self.names.landmark()
        hours = self.of(NUMBERS)
        by = self.of(["train", "bus", "boat", "bicycle", "car"])
        return " ".join(
            [
                f"{a} travels from {x} to {y} by {by}.",
                self.pick(f"The journey takes {hours} hours.", f"It is {hours} hours to {y}."),
                self.pick(f"On the way {a} sees {mark}.", f"The {by} stops near {mark}.", f"Turn left at {mark} and go straight on."),
                self.pick(f"From {mark} it is not far to {y}.", f"After {mark} the road goes up the hill."),
                self.pick(f"After {hours} hours {a} is in {y}.", f"{a} likes {y} better than {x}.", f"On {self.of(DAYS)} {a} goes back from {y} to {x}."),
            ]
        )

    def animal(self):
        kind, name, owner, colour = self.of(ANIMALS), self.names.town(), self.of(PEOPLE), self.of(COLOURS)
        return " ".join(
            [
                f"{name} is {article(colour)} {kind}.",
                f"{name} belongs to {owner}.",
                self.pick(f"Every morning the {kind} waits at the gate.", f"The {kind} sleeps under an old tree.", f"{name} eats {self.of(FRUITS)} and grass."),
                self.pick(f"When {owner} calls, {name} comes at once.", f"{owner} and {name} walk to the river."),
                f"Have you seen the {colour} {kind}? Yes, {name} is with {owner}.",
            ]
        )

    def house(self):
        owner, town = self.of(PEOPLE), self.names.town()
        rooms = self.some(ROOMS, 2, 3)
        things = self.some(THINGS, len(rooms), len(rooms))
        text = [f"{owner} has a {self.of(COLOURS)} house in {town}."]
        text += [f"In the {room} there is {article(thing)}." for room, thing in zip(rooms, things)]
        i = self.rng.randrange(len(rooms))
        text.append(f"Where is the {things[i]}? The {things[i]} is in the {rooms[i]}.")
        return " ".join(text)

    def work(self):
        job, town = self.of(JOBS), self.names.town()
        name = self.of(PEOPLE)
        return " ".join(
            [
                f"{article(job).capitalize()} {WORKPLACES[job]}.",
                f"{name} is the only {job} in {town}.",
                self.pick("The work begins early and ends late.", "It is hard work, but the pay is good.", f"{name} learned it from an uncle."),
                self.pick(f"Without {name} there would be no {job} in {town}.", f"The people of {town} need {article(job)} like {name}."),
            ]
        )

    def opinions(self):
        place, food = self.names.place(), self.of(FOODS)
        a, b, c = self.some(PEOPLE, 3, 3)
        good = self.pick("excellent", "very good", "wonderful", "cheap and good")
        bad = self.pick("poor", "too expensive", "cold", "only average")
        return " ".join(
            [
                f"{a} and {b} talk about {place}.",
                f"{a} calls the {food} at {place} {good}.",
                f"{b} finds the {food} {bad}.",
                self.pick(f"{c} has never been to {place}.", f"{c} agrees with {a} that it is {good}.", f"{c} agrees with {b} that it is {bad}."),
                self.pick(f"So what is {place} like? {a} calls it {good} and {b} calls it {bad}.", f"We should try the {food} at {place} ourselves."),
            ]
        )

    def introductions(self):
        a, b = self.some(PEOPLE, 2, 2)
        x, y = self.names.town(), self.names.town()
        return f"Hello, my name is {a} and I come from {x}. Nice to meet you, {a}. I am {b} from {y}. Is {y} far from {x}, {b}? No, {a}, {y} and {x} are close."

    def area(self):
        town, a = self.names.town(), self.of(PEOPLE)
        x, y = self.some(AREAS, 2, 2)
        neighbour = self.of(JOBS)
        return " ".join(
            [
                self.pick(f"Which area of {town} do you like best?", f"There are many areas in {town}."),
                f"{a} likes the {x}, but I like the {y}.",
                self.pick(f"The food is better in the {y}.", f"In the {y} the rating of every hotel is high.", f"The {y} is found easily."),
                self.pick(f"{a} has a kind neighbour there, {article(neighbour)}.", f"Our neighbour, {article(neighbour)}, moved to the {x}."),
                f"So {a} stays in the {x}.",
            ]
        )

    def manners(self):
        a, b = self.some(PEOPLE, 2, 2)
        place, kind = self.names.place(), self.of(KINDS)
        return self.pick(
            f"What kind of place is {place}? It is {article(kind)}. {a} had to wait there, because they do not admit guests after ten. {b} was admitted to {place} before.",
            f"{a} reads the menu of {place}. The menu is long. {b} reads the menu too and rates {place} as the best {kind} in town.",
            f"{a} serves tea to {b}. A cup costs {self.of(NUMBERS)} coins. Its colour is brown. {b} likes eating cake with it. When {a} serves tea, {b} pays what the cup costs.",
            f"The teacher rates the work of {a}. Her rating is good. Then {b} asks to rate it. Is the rating of {b} good? Its rating is good, yes.",
            f"This coat suits {a}. Does it suit {b}? No, but the hat suits {b}. {a} and {b} find dinner, a meal and a table at {place}.",
            f"The whole family might try {place}. Down the street {a} found a place named after {b}. Did {b} enjoy it? Yes, {b} did enjoy it.",
        )

    def meanings(self):
        job = self.of(JOBS)
        word = self.names.town().lower()
        animal = self.of(ANIMALS)
        return self.pick(
            f"A person who {WORKPLACES[job]} is called {article(job)}. So what is {article(job)}? {capital(article(job))} is a person who {WORKPLACES[job]}.",
            f"In our language {article(animal)} is called {word}. One {word} is small, two are many. When you see a {word}, you see {article(animal)}.",
        )


# ---------------------------------------------------------------------------------------------- restaurants


class Restaurants:
    """`meaning||reference` lines: slots of an invented restaurant, and two or three sentences that say them all."""

    def __init__(self, names, rng):
        self.names = names
        self.rng = rng

    def slots(self):
        rng = self.rng
        every = dict(
            place=self.names.place(),
            kind=rng.choice(KINDS),
            food=rng.choice(FOODS),
            price=rng.choice(["cheap", "moderate", "expensive", f"{rng.randint(3, 60)} crowns"]),
            area=rng.choice(list(AREAS)),
            guests=rng.choice(["excellent", "good", "average", "poor"]),
            children=rng.choice(["yes", "no"]),
            beside=self.names.landmark(),
        )
        optional = list(every)[1:]
        keep = set(rng.sample(optional, rng.choice([2, 3, 3, 4, 4, 5])))
        return {key: value for key, value in every.items() if key == "place" or key in keep}

    def reference(self, slots):
        pick = self.rng.choice
        name = slots["place"]
        left = {key for key in slots if key != "place"}

        def take(*keys):
            if all(key in left for key in keys):
                left.difference_update(keys)
                return True
            return False

        # First sentence: the name and what the drawn frame can carry.
        frame = self.rng.randrange(4)
        where = AREAS.get(slots.get("area"))
        kind = article(slots["kind"]) if "kind" in slots else None
        sentences = []
        if frame == 0 and take("beside", "kind"):
            sentences.append(f"Right beside {slots['beside']} you will find {name}, {kind}" + (f" {where}." if take("area") else "."))
        elif frame == 1 and take("food"):
            what = f", {kind}," if take("kind") else ""
            sentences.append(f"{name}{what} serves {slots['food']}" + (f" {where}." if take("area") else "."))
        elif frame == 2 and take("area"):
            sentences.append(f"{capital(where)} there is {kind + ' named ' if take('kind') else ''}{name}" + (f" with {slots['food']}." if take("food") else "."))
        elif take("kind"):
            sentences.append(f"{name} is {kind}" + (f" {where}" if take("area") else "") + (f" that serves {slots['food']}." if take("food") else "."))
        elif take("food"):
            sentences.append(f"Enjoy {slots['food']} at {name}" + (f" {where}." if take("area") else "."))
        else:
            sentences.append(f"You might try {name}" + (f" {where}." if take("area") else "."))

        # The rest, joined in pairs.
        price = slots.get("price", "")
        clauses = {
            "kind": [f"it is {kind}"],
            "food": [f"the menu offers {slots.get('food')}"],
            "price": [f"a meal costs {price}", f"dinner is {price}"] if price[:1].isdigit() else [f"its prices are {price}", f"eating there is {price}"],
            "area": [f"it is found {where}"],
            "guests": [f"guests rate it as {slots.get('guests')}", f"its rating is {slots.get('guests')}"],
            "children": ["it is happy to see children", "it suits the whole family"]
            if slots.get("children") == "yes"
            else ["it does not admit children", "it does not suit families"],
            "beside": [f"its neighbour is {slots.get('beside')}", f"it stands beside {slots.get('beside')}"],
        }
        rest = [pick(clauses[key]) for key in slots if key in left]
        while rest:
            if len(rest) > 1:
                sentences.append(capital(f"{rest[0]} and {rest[1]}."))
            else:
                sentences.append(capital(rest[0]) + ".")
            rest = rest[2:]
        return " ".join(sentences)

    def line(self):
        slots = self.slots()
        meaning = "; ".join(f"{key}: {value}" for key, value in slots.items())
        return f"{meaning}||{self.reference(slots)}"


# ---------------------------------------------------------------------------------------------- all of it


def pretraining(seed, paragraphs):
    rng = random.Random(seed + 1)
    writer = Paragraphs(Names(name_pools(seed), "pretrain", rng), rng)
    return [writer.one() for _ in range(paragraphs)]


def restaurants(seed, part, lines):
    rng = random.Random(seed + 1 + PARTS.index(part))
    writer = Restaurants(Names(name_pools(seed), part, rng), rng)
    return [writer.line() for _ in range(lines)]


if __name__ == "__main__":
    for paragraph in pretraining(1, 40):
        print(paragraph, end="\n\n")
    for line in restaurants(1, "train", 30):
        print(line)
