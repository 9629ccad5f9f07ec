"""Word lists for names of quantities: words to use, words to leave out, and a little English grammar."""

import builtins
import keyword
import re

_IRREGULAR = """
be:was:been:is:are:were buy:bought:bought bring:brought:brought catch:caught:caught choose:chose:chosen
come:came:come do:did:done draw:drew:drawn drink:drank:drunk drive:drove:driven eat:ate:eaten fall:fell:fallen
feed:fed:fed find:found:found fly:flew:flown get:got:received give:gave:given go:went:gone grow:grew:grown
hang:hung:hung have:had:had:has hear:heard:heard hide:hid:hidden hold:held:held keep:kept:kept know:knew:known
lay:laid:laid lead:led:led lend:lent:lent lose:lost:lost make:made:made meet:met:met pay:paid:paid ride:rode:ridden
run:ran:run see:saw:seen sell:sold:sold send:sent:sent sew:sewed:sewn shoot:shot:shot sing:sang:sung sit:sat:sat
sleep:slept:slept speak:spoke:spoken spend:spent:spent stand:stood:stood steal:stole:stolen swim:swam:swum
take:took:taken teach:taught:taught tell:told:told think:thought:thought throw:threw:thrown wear:wore:worn
win:won:won write:wrote:written cut:cut:cut put:put:put read:read:read hit:hit:hit cost:cost:cost set:set:set
split:split:split spread:spread:spread knit:knit:knit build:built:built begin:began:begun break:broke:broken
leave:left:left freeze:froze:frozen
"""
_REGULAR = """
add answer arrive attend average bake bike borrow burn calculate carry charge climb collect complete consume contain
contribute convert cook count cover crack create cycle deliver deposit discount divide donate double download drop
earn employ empty end equal examine fill finish fish fix gain gather grade harvest hatch hire hunt increase invest
invite jog jump kill knock learn lift like live load manage measure mow multiply need offer open order organize owe
own pack paint pass pick place plan plant play pour practice prepare press print produce pull purchase race raise
reach realize receive record reduce remain remove rent repair require return roll save score serve share ship slice
solve stack start stay stop store study subtract supply swap trade train transfer travel type use visit vote wait
walk want wash waste watch water weigh work wrap yell miss decide agree own clean rest pile ask bet bury melt move
occupy fold tie allow hike kick last hold produce sign skip spill stitch swallow sweep tip total trim tutor unload
translate enter"""
_DOUBLED = set(
    "drop jog plan ship skip slip snap stop swap trim wrap tip jot dip chop grab hug nap pat rub shop trap".split()
)

FUNCTION_WORDS = set(
    """a an the this that these those his her hers their theirs its my our your he she it they we you i him them us me
    and or but nor so yet if then than as because since while when where which who whom whose what how why whether
    though although until unless after before during by for from in into of off on onto out over per through to
    toward towards under up down upon with within without at about above across against along among around behind
    below beneath beside besides between beyond near not no is are was were be been being am do does did doing done
    has have had having will would can could shall should may might must there here also only just even still too
    very much many more most less least fewer some any all both each every either neither other another such same
    own again ever never always often sometimes now today already yet almost about approximately exactly altogether
    together therefore thus hence however finally first second next later once twice half double triple dozen third
    thrice respectively instead let lets let's that's it's there's know knows means mean needs need find us way
    amount number equal equals answer calculate determine because therefore since one two three four five six seven
    eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty
    fifty sixty seventy eighty ninety hundred thousand million billion percent times time's plus minus divided
    multiplied worth etc like upto roughly least using x himself herself themselves itself assuming given according
    due per s t d ll re ve don doesn didn isn wasn won't quantity subtract divide multiply add adding subtracting
    dividing multiplying giving result resulting compared back away apart ago enough yes well okay nearly get gets
    got say says said become becomes became except including include includes called named able want wants wanted
    new going go goes went lets mr mrs ms dr different available additional also taller shorter older younger longer
    heavier faster slower bigger smaller larger higher lower cheaper considering represents represent express find
    found far""".split()
)
# Words that carry no meaning for a name although they are nouns or adjectives.
EMPTY = set("total thing things certain different particular entire whole various exact real new main lot lots".split())
TIME = set("second seconds minute minutes hour hours day days week weeks month months year years night nights".split())
MONTHS = set(
    """january february march april may june july august september october november december monday tuesday wednesday
    thursday friday saturday sunday mondays tuesdays wednesdays thursdays fridays saturdays sundays""".split()
)
MONEY = set("dollar dollars cent cents euro euros pound pounds buck bucks rupees pesos".split())
MEASURES = {"tall": "height", "high": "height", "long": "length", "wide": "width", "deep": "depth", "old": "age"}
MEASURES |= {"away": "distance", "thick": "thickness"}
ABBREVIATIONS = dict(
    entry.split(":")
    for entry in """cm:centimeters mm:millimeters km:kilometers kg:kilograms kgs:kilograms g:grams mg:milligrams
    ml:milliliters mls:milliliters ft:feet sq:square lb:pounds lbs:pounds oz:ounces hr:hours hrs:hours min:minutes
    mins:minutes sec:seconds secs:seconds mph:miles_per_hour kph:kilometers_per_hour kmph:kilometers_per_hour
    kw:kilowatts kwh:kilowatt_hours yr:years yrs:years gb:gigabytes mb:megabytes tv:television pc:pieces pcs:pieces
    m:meters l:liters""".split()
)
_SINGULAR = dict(
    entry.split(":")
    for entry in """people:person children:child men:man women:woman feet:foot mice:mouse teeth:tooth geese:goose
    leaves:leaf loaves:loaf knives:knife halves:half shelves:shelf pennies:penny calves:calf wolves:wolf
    scarves:scarf""".split()
)
_IE = set("cookies brownies movies smoothies selfies hoodies calories veggies zombies rookies pixies cuties".split())
_KEEP = ("ss", "gas", "us", "is", "sheep", "series", "species")
RESERVED = set(keyword.kwlist) | set(keyword.softkwlist) | set(dir(builtins)) | {"result", "solution", "math", "sympy"}


def _forms() -> dict[str, str]:
    """Maps every form of a known verb to the participle that a name uses: {"sells": "sold", "selling": "sold"}."""
    forms = {}
    for verb in _REGULAR.split():
        stem = verb[:-1] if verb.endswith("e") else verb
        stem += verb[-1] if verb in _DOUBLED else ""
        past = verb[:-1] + "ied" if verb.endswith("y") and verb[-2] not in "aeiou" else stem + "ed"
        for form in (verb, present(verb), past, stem + "ing"):
            forms[form] = past
    for entry in _IRREGULAR.split():
        verb, *others = entry.split(":")
        stem = verb[:-1] if verb.endswith("e") and verb != "be" else verb
        doubled = stem + stem[-1] if re.search(r"[^aeiou][aeiou][bdgmnpt]$", stem) else stem
        for form in (verb, present(verb), *others, stem + "ing", doubled + "ing"):
            forms[form] = others[1]
    return forms


def present(verb: str) -> str:
    """The verb's form for he, she and it."""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


def singular(noun: str) -> str:
    """The singular of a noun; in a phrase joined by underscores, of its last word."""
    before, joint, noun = noun.rpartition("_")
    return before + joint + _singular_word(noun)


def _singular_word(noun: str) -> str:
    if noun in _SINGULAR:
        return _SINGULAR[noun]
    if noun.endswith(_KEEP) or len(noun) < 4 or not noun.endswith("s"):
        return noun
    if noun.endswith("ies") and noun not in _IE and len(noun) > 4:
        return noun[:-3] + "y"
    return noun[:-2] if re.search(r"(ss|x|ch|sh|zz|tato|mato|mango|hero|bus|bonus|lens)es$", noun) else noun[:-1]


PARTICIPLES = {form: participle for form, participle in _forms().items() if form != "building"}
# Verbs whose bare form and form with -s are just as often nouns: "a soft drink", "two plants".
NOUN_LIKE = set(
    """answer bake bike burn charge climb cook count cover cut crack cycle deposit discount divide double drink drive
    drop end fill fish fix grade hire hunt increase jump like load measure need offer order pack paint pass pick
    place plan plant play pour practice press print produce purchase race raise record rent repair return roll run
    save score serve share ship slice stack start stay stop store study supply swap trade train transfer travel type
    use visit vote walk wash waste watch water weigh work wrap bet move kick last hold sign skip spill stitch sweep
    tip total trim clean rest pile hike cost set split spread read hit sleep swim wear stand throw lead feed leave
    draw find fall ride catch build""".split()
)
# Participles that add nothing to a name.
WEAK = set(
    """had been done come gone known thought told liked wanted started ended decided calculated equaled lived multiplied
    subtracted divided added totaled averaged begun realized agreed planned stopped seen found taken made""".split()
)
