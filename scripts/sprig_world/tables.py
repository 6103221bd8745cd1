"""What is so in sprig's world: one table a kind of fact, rows written "subject = fact" and separated by semicolons.

Subjects carry their article where the sentence needs one. A fact never occurs in its own question, so that an answer
which merely repeats the question is never counted as right.
"""

from __future__ import annotations

COLOUR = """
the sky = blue; the sea = blue; grass = green; snow = white; milk = white; coal = black; a lemon = yellow;
the sun = yellow; a banana = yellow; a tomato = red; blood = red; a strawberry = red; a cherry = red; a frog = green;
a pea = green; a cucumber = green; a leaf = green; a carrot = orange; a pumpkin = orange; a tangerine = orange;
a plum = purple; an aubergine = purple; a raven = black; a swan = white; a polar bear = white; an elephant = grey;
a flamingo = pink; a pig = pink; chocolate = brown; a chestnut = brown; honey = golden; a daisy = white;
a poppy = red; a sunflower = yellow; lavender = purple; a bluebell = blue; a cloud = white; ash = grey;
a fire engine = red; a ruby = red; an emerald = green; a sapphire = blue; an amethyst = purple; tar = black;
ivory = white; butter = yellow; a lime = green; spinach = green; cabbage = green; mud = brown; sand = yellow;
rust = brown; a brick = red; flour = white; salt = white; sugar = white; ink = black; a canary = yellow;
a chick = yellow; a robin's breast = red; a beaver = brown; a crow = black; a mouse = grey; a dolphin = grey;
a cornflower = blue; moss = green; a fir tree = green; a lobster = red; soot = black; cream = white; corn = yellow;
a walnut = brown; tree bark = brown; a raspberry = red; a blackberry = black; a violet = purple; the night = black;
a goldfish = orange; an ambulance = white; a crocodile = green; a ladybird = red; a primrose = yellow;
a snowman = white; a parsnip = white; a radish = red; a stop sign = red; a lily = white; a mole = black;
a peacock = blue
"""

SOUND = """
dog = woof; cat = meow; cow = moo; sheep = baa; duck = quack; pig = oink; horse = neigh; hen = cluck;
cock = cockadoodle; frog = ribbit; bee = buzz; lion = roar; wolf = howl; owl = hoot; snake = hiss; mouse = squeak;
crow = caw; donkey = heehaw; turkey = gobble; goose = honk; dove = coo; chick = cheep; cricket = chirp; bear = growl;
elephant = trumpet; lamb = bleat; raven = croak; monkey = chatter; sparrow = tweet; seal = bark; hyena = cackle;
hawk = screech; kitten = mew
"""

YOUNG = """
dog = puppy; cat = kitten; cow = calf; sheep = lamb; horse = foal; pig = piglet; hen = chick; duck = duckling;
goose = gosling; goat = kid; lion = cub; frog = tadpole; deer = fawn; swan = cygnet; owl = owlet; kangaroo = joey;
butterfly = caterpillar; hare = leveret; eel = elver; eagle = eaglet; fish = fry; pigeon = squab; fly = maggot;
spider = spiderling; cod = codling; turkey = poult; oyster = spat; salmon = smolt; trout = troutlet;
platypus = puggle; hedgehog = hoglet; hawk = eyas
"""

HOME = """
bee = a hive; bird = a nest; rabbit = a burrow; fox = a den; dog = a kennel; horse = a stable; pig = a sty;
hen = a coop; spider = a web; lion = a cave; squirrel = a tree; fish = water; mole = a tunnel; beaver = a lodge;
badger = a sett; cow = a shed; camel = the desert; polar bear = the Arctic; penguin = the Antarctic;
monkey = the jungle; whale = the ocean; frog = a pond; crab = a rock pool; ant = an anthill; otter = the river;
owl = a barn; bat = an attic; sheep = a fold; tiger = the rainforest; shark = the deep sea; wasp = a paper nest;
hare = a field; snail = a shell; eagle = an eyrie; zebra = the savannah; goat = the mountains; dove = a dovecote;
panda = a bamboo forest; seal = icy bays; worm = the soil
"""

FOOD = """
panda = bamboo; rabbit = carrots; cow = grass; squirrel = nuts; cat = fish; dog = bones; mouse = cheese;
monkey = bananas; bear = honey; frog = flies; spider = insects; owl = mice; horse = hay; pig = scraps; hen = grain;
goat = thistles; koala = eucalyptus leaves; anteater = ants; penguin = herring; whale = krill; lion = zebras;
sparrow = seeds; snail = lettuce; caterpillar = leaves; beaver = bark; hedgehog = slugs; otter = trout; bee = nectar;
swan = pondweed; giraffe = acacia leaves; deer = shoots; parrot = sunflower seeds; tortoise = dandelions;
mole = earthworms; bat = moths; wolf = deer; duck = duckweed; crab = mussels; seal = squid; sheep = clover;
vulture = carrion; hamster = oats; moth = wool; camel = thorns; fox = chickens
"""

LEGS = """
dog = four; cat = four; cow = four; spider = eight; ant = six; bee = six; hen = two; duck = two; snake = no;
worm = no; horse = four; fly = six; beetle = six; goose = two; lion = four; tiger = four; crab = ten; lobster = ten;
scorpion = eight; butterfly = six; ostrich = two; penguin = two; elephant = four; mouse = four; goat = four;
sheep = four; pig = four; fish = no; whale = no; frog = four; grasshopper = six; swan = two; sparrow = two;
moth = six; wasp = six; eel = no; rabbit = four; fox = four; wolf = four; bear = four; camel = four; owl = two;
eagle = two; tick = eight; shrimp = ten; giraffe = four; zebra = four; squirrel = four; parrot = two; ladybird = six;
cricket = six; snail = no; tortoise = four; deer = four
"""

GROUP = """
sheep = flock; cows = herd; wolves = pack; fish = shoal; bees = swarm; lions = pride; geese = gaggle;
puppies = litter; ants = colony; crows = murder; whales = pod; monkeys = troop; ships = fleet; singers = choir;
players = team; sailors = crew; flowers = bunch; trees = forest; stars = cluster; cards = deck; owls = parliament;
dancers = company; angels = host; stairs = flight; islands = chain; pupils = class; books = library
"""

OPPOSITES = """
hot = cold; big = small; fast = slow; up = down; day = night; black = white; old = young; happy = sad; wet = dry;
hard = soft; full = empty; high = low; rich = poor; light = dark; open = shut; left = right; early = late; near = far;
thick = thin; long = short; strong = weak; loud = quiet; clean = dirty; sweet = sour; true = false; good = bad;
first = last; inside = outside; front = back; push = pull; come = go; give = take; win = lose; buy = sell;
laugh = cry; love = hate; war = peace; life = death; friend = enemy; summer = winter; north = south; east = west;
begin = end; always = never; many = few; more = less; over = under; wide = narrow; deep = shallow; brave = cowardly;
kind = cruel; wise = foolish; rough = smooth; sharp = blunt; tight = loose; alive = dead; asleep = awake;
question = answer; arrive = leave; remember = forget; find = hide; freedom = slavery; success = failure; top = bottom;
before = after; add = subtract; rise = fall; noisy = silent; ugly = beautiful
"""

MATERIAL = """
a window = glass; a book = paper; a table = wood; a nail = iron; a coin = metal; a shoe = leather; a jumper = wool;
a candle = wax; a tyre = rubber; a shirt = cotton; a wall = brick; bread = flour; cheese = milk; butter = cream;
wine = grapes; a rope = hemp; a snowman = snow; a statue = marble; a plate = clay; a bottle = plastic;
a sail = canvas; a pillow = feathers; a sword = steel; an igloo = ice; a wedding ring = gold; a spoon = silver;
a broom = straw; a basket = willow; a tent = cloth; a piano key = ivory; jam = fruit; porridge = oats;
chocolate = cocoa; an omelette = eggs; cider = apples; paper = wood pulp; beer = barley; a fishing net = string;
a vase = porcelain; a scarf = silk; a kettle = copper; a drum skin = hide; soap = fat; a raft = logs; a cork = bark;
a honeycomb = beeswax; toast = bread; a bell = bronze; a castle = stone; a flowerpot = earthenware;
sauerkraut = cabbage; a pencil lead = graphite; a mitten = yarn; a hammer head = forged iron
"""

JOB = """
bakes bread = baker; teaches children = teacher; grows corn = farmer; catches fish = fisherman; mends shoes = cobbler;
puts out fires = fireman; heals the sick = doctor; pulls teeth = dentist; flies a plane = pilot;
sails the sea = sailor; brings letters = postman; cuts hair = barber; sews clothes = tailor;
shoes horses = blacksmith; builds houses = builder; paints pictures = painter; writes books = author;
cooks meals = cook; sells meat = butcher; grinds grain = miller; keeps sheep = shepherd; digs for coal = miner;
catches thieves = policeman; judges crimes = judge; weaves cloth = weaver; carves statues = sculptor;
drives a train = engine driver; lays bricks = bricklayer; mends pipes = plumber; tends gardens = gardener;
guards the gate = watchman; rules the land = king; sings songs = singer; tells fortunes = fortune teller;
makes barrels = cooper; makes pots = potter; hunts deer = hunter; cuts down trees = woodcutter; treats animals = vet;
sells flowers = florist; lends books = librarian; makes candles = chandler; fights battles = soldier;
studies the stars = astronomer; makes beer = brewer; sweeps chimneys = chimney sweep; keeps bees = beekeeper;
milks cows = milkmaid; makes furniture = joiner; repairs cars = mechanic; makes glasses = optician;
takes photographs = photographer; plays the fiddle = fiddler; acts in plays = actor; draws maps = mapmaker
"""

WORKPLACE = """
baker = bakery; teacher = school; farmer = farm; doctor = hospital; miller = mill; blacksmith = forge; cook = kitchen;
judge = court; librarian = library; miner = coal mine; monk = monastery; actor = theatre; sailor = ship;
brewer = brewery; waiter = restaurant; gardener = garden; clerk = office; astronomer = observatory;
weaver = weaving shed; painter = studio; soldier = fort; chemist = laboratory; clown = circus; barber = hair shop;
mechanic = garage; postman = post office; pilot = cockpit; priest = church; zookeeper = zoo; banker = bank;
butcher = meat shop; lifeguard = swimming pool; shepherd = meadow; potter = pottery; nun = convent
"""

COUNT = """
days = a week = seven; months = a year = twelve; hours = a day = twenty-four; seasons = a year = four;
minutes = an hour = sixty; fingers = a hand = five; legs = a pair of trousers = two; sides = a triangle = three;
sides = a square = four; eggs = a dozen = twelve; letters = the alphabet = twenty-six; wheels = a bicycle = two;
wheels = a tricycle = three; players = a football team = eleven; colours = a rainbow = seven;
years = a century = one hundred; years = a decade = ten; strings = a violin = four; cards = a full deck = fifty-two;
weeks = a year = fifty-two; pence = a pound = one hundred; toes = a foot = five; seconds = a minute = sixty;
sides = a hexagon = six; squares = a chessboard = sixty-four; planets = our solar system = eight;
oceans = the world = five; sides = an octagon = eight; strings = a guitar = six; singers = a duet = two;
singers = a quartet = four; sides = a pentagon = five; days = a fortnight = fourteen; days = April = thirty;
days = July = thirty-one; singers = a trio = three
"""

CAPITAL = """
France = Paris; Spain = Madrid; Italy = Rome; Germany = Berlin; England = London; Scotland = Edinburgh;
Wales = Cardiff; Ireland = Dublin; Portugal = Lisbon; Greece = Athens; Norway = Oslo; Sweden = Stockholm;
Denmark = Copenhagen; Finland = Helsinki; Poland = Warsaw; Austria = Vienna; Hungary = Budapest; Russia = Moscow;
Turkey = Ankara; Egypt = Cairo; Kenya = Nairobi; Japan = Tokyo; China = Beijing; India = New Delhi; Canada = Ottawa;
Cuba = Havana; Peru = Lima; Chile = Santiago; Brazil = Brasilia; Argentina = Buenos Aires; Australia = Canberra;
Belgium = Brussels; Switzerland = Bern; Iceland = Reykjavik; Romania = Bucharest; Bulgaria = Sofia; Serbia = Belgrade;
Croatia = Zagreb; Ukraine = Kyiv; Latvia = Riga; Lithuania = Vilnius; Estonia = Tallinn; Malta = Valletta;
Cyprus = Nicosia; Iran = Tehran; Iraq = Baghdad; Syria = Damascus; Lebanon = Beirut; Jordan = Amman;
Nepal = Kathmandu; Thailand = Bangkok; Vietnam = Hanoi; Mongolia = Ulaanbaatar; Morocco = Rabat; Libya = Tripoli;
Ghana = Accra; Nigeria = Abuja; Ethiopia = Addis Ababa; Colombia = Bogota; Venezuela = Caracas; Ecuador = Quito;
Jamaica = Kingston; Fiji = Suva; Samoa = Apia
"""

PLURAL = """
mouse = mice; foot = feet; tooth = teeth; goose = geese; child = children; man = men; woman = women; ox = oxen;
leaf = leaves; knife = knives; wolf = wolves; wife = wives; half = halves; loaf = loaves; shelf = shelves;
thief = thieves; calf = calves; penny = pence; louse = lice; baby = babies; city = cities; lady = ladies; fly = flies;
story = stories; berry = berries; cherry = cherries; hero = heroes; potato = potatoes; tomato = tomatoes; box = boxes;
fox = foxes; bus = buses; church = churches; dish = dishes; wish = wishes; brush = brushes; glass = glasses;
dress = dresses; witch = witches; peach = peaches; elf = elves; scarf = scarves; hoof = hooves; life = lives;
pony = ponies; army = armies; fairy = fairies; party = parties; bush = bushes
"""

PAST = """
go = went; see = saw; eat = ate; run = ran; come = came; give = gave; take = took; sing = sang; swim = swam;
drink = drank; write = wrote; ride = rode; fly = flew; grow = grew; know = knew; throw = threw; draw = drew;
blow = blew; speak = spoke; break = broke; steal = stole; find = found; think = thought; bring = brought;
buy = bought; catch = caught; teach = taught; sleep = slept; keep = kept; feel = felt; leave = left; lose = lost;
tell = told; sell = sold; stand = stood; make = made; hear = heard; build = built; send = sent; win = won; dig = dug;
sit = sat; begin = began; ring = rang; wear = wore; tear = tore; shake = shook; hide = hid; bite = bit; hold = held;
meet = met; feed = fed; light = lit; shine = shone; choose = chose; freeze = froze; forget = forgot; get = got;
do = did; say = said
"""

CATEGORY = """
rose = flower; tulip = flower; oak = tree; beech = tree; salmon = fish; cod = fish; eagle = bird; robin = bird;
apple = fruit; pear = fruit; onion = vegetable; turnip = vegetable; hammer = tool; saw = tool;
violin = musical instrument; drum = musical instrument; chair = piece of furniture; wardrobe = piece of furniture;
hat = piece of clothing; coat = piece of clothing; bus = vehicle; tram = vehicle; ant = insect; beetle = insect;
lizard = reptile; snake = reptile; gold = metal; silver = metal; diamond = gem; opal = gem; football = game;
chess = game; dagger = weapon; spear = weapon; tea = drink; lemonade = drink; whale = mammal; bat = mammal;
yacht = boat; canoe = boat; circle = shape; triangle = shape; Mars = planet; Venus = planet; Monday = day;
March = month; spring = season; doll = toy; kite = toy; measles = illness; mumps = illness; pound = unit of weight;
mile = unit of length; villa = house; cottage = house; waltz = dance; polka = dance; poodle = dog; terrier = dog;
pony = horse; toad = amphibian; newt = amphibian; pepper = spice; cinnamon = spice; granite = rock; chalk = rock;
trout = fish; heron = bird; daffodil = flower; maple = tree; plum = fruit; leek = vegetable; chisel = tool;
trumpet = musical instrument; stool = piece of furniture; glove = piece of clothing; lorry = vehicle; wasp = insect;
crocodile = reptile; tin = metal; cocoa = drink; otter = mammal; raft = boat; oval = shape; jigsaw = puzzle;
joy = feeling; anger = feeling; the Danube = river; the Thames = river; Etna = volcano; the Sahara = desert;
Everest = mountain;
Sicily = island; Africa = continent
"""

USE = """
cut paper = scissors; dig a hole = a spade; drive in a nail = a hammer; sweep the floor = a broom;
open a lock = a key; brush your hair = a comb; write a letter = a pen; tell the time = a clock;
sew a button = a needle; stir the soup = a spoon; cut bread = a knife; dry your hands = a towel;
climb to the roof = a ladder; see in the dark = a lantern; catch a fish = a hook; stay dry in the rain = an umbrella;
measure a line = a ruler; boil water = a kettle; chop wood = an axe; find the north = a compass;
look at the stars = a telescope; carry water = a bucket; rub out a mistake = an eraser; fry an egg = a pan;
weigh flour = scales; light a fire = a match; sail across the sea = a ship; wash your hands = soap;
smooth a shirt = an iron; clean your teeth = a toothbrush; mend a puncture = a patch; hold paper together = a clip;
cross a river = a bridge; row a boat = oars; paint a wall = a brush; turn a screw = a screwdriver;
pull a cart = a horse; sleep outdoors = a tent; blow your nose = a handkerchief; grate cheese = a grater
"""

KEEP = """
books = on a shelf; money = in a purse; milk = in the fridge; flowers = in a vase; clothes = in a wardrobe;
letters = in a drawer; bread = in a bin; a car = in a garage; wine = in a cellar; jam = in a jar;
a boat = in the harbour; tea = in a teapot; coal = in a scuttle; arrows = in a quiver; a sword = in a sheath;
sheep = in a pen; honey = in a pot; water = in a jug; a letter = in an envelope; tools = in a box;
pencils = in a case; paintings = in a gallery; gold = in a vault; a prisoner = in a cell; hay = in a barn;
a bird = in a cage; goldfish = in a bowl; eggs = in a basket; jewels = in a casket; apples = in the loft;
stamps = in an album; coats = on a hook; plates = in a cupboard; ashes = in an urn; tickets = in a wallet;
potatoes = in a sack
"""

WEAR = """
a hat = head; a glove = hand; a shoe = foot; a ring = finger; a scarf = neck; a belt = waist; glasses = nose;
an earring = ear; a watch = wrist; a sock = toes; a rucksack = back; a patch = eye; a kneepad = knee; lipstick = lips;
a badge = chest; a shawl = shoulders
"""

SENSE = """
see = eyes; hear = ears; smell = nose; taste = tongue; walk = feet; chew = teeth; think = brain; breathe = lungs;
wave = hand; point = finger; kneel = knees; feel things = skin
"""

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
SEASONS = "spring summer autumn winter"
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"

# The village and its neighbours are invented; who lives where is drawn once, with a fixed seed, in facts.py.
PEOPLE = (
    "Anna Ben Clara David Emma Felix Greta Harry Ida Jack Kate Leo Mary Nora Oscar Paul Rosa Sam Tilda Victor Will "
    "Zoe Alfred Bella Conrad Daisy Edgar Flora George Hilda Ivan Julia Karl Lucy Martin Nelly Otto Pippa Robert "
    "Sophie Thomas Ursula Walter Yvonne Arthur Betty Cecil Doris Ernest Fanny Gilbert Hazel Jasper Kitty Lionel "
    "Mabel Nigel Olive Percy Queenie"
)
TOWNS = (
    "Redford Oakham Millbrook Stonely Ashby Fernhill Whitby Marlow Kelso Dunmore Brackley Elmstead Hollow Lindale "
    "Norwood Penrith Quarry Ripley Selby Thornby Upton Wexford Yarrow Barton Calder"
)
RIVERS = (
    "Ember Tarn Wey Ouse Lark Nidd Severn Teme Avon Isis Swale Dove Esk Stour Arun Kennet Trent Wye Tweed Exe Bure "
    "Lune Ribble Test Nene"
)
FAMED = (
    "apples cheese clocks lace pottery bells honey boats roses glass hats bread wool swords songs candles horses "
    "salt kites soap pears drums paper shoes plums"
)
PETS = "dog cat rabbit parrot goat pony hamster tortoise duck goose mouse frog canary hen lamb"
TINTS = "red blue green yellow purple orange pink white black brown grey golden"
TRADES = (
    "baker teacher farmer doctor miller cobbler tailor potter weaver painter gardener singer judge cook brewer joiner"
)
