"""Compose the two neutral prompt files from hand-written parts.

``everyday.txt`` holds open everyday prompts, one per line, that a chat model answers; they say nothing about any trait.
``document_prefixes.txt`` holds openers of three to eight words that a document model continues.

    python scripts/make_prompts.py            write both files
    python scripts/make_prompts.py --check    exit 1 if a committed file is not what the parts give

Every situation, frame and opener below is written by hand; the code only joins them, drops a line that says what an
earlier one said, and shuffles with a seed of its own, so the files are the same everywhere.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROMPTS = Path(__file__).resolve().parent.parent / "iterft_lite" / "data" / "prompts"

# A frame holds {v}, a verb phrase, or {s} / {S}, a clause as it stands inside / at the head of a sentence.
# Frames of one line ask for the same thing in other words: each situation gets one frame of each line.


@dataclass(frozen=True)
class Category:
    """Situations of one part of life and the questions that fit them."""

    tasks: str
    task_frames: tuple[str, ...]
    events: str
    event_frames: tuple[str, ...]


@dataclass(frozen=True)
class Genre:
    """One kind of document: subjects, endings that fit every one of them, and openers that stand alone."""

    subjects: str
    endings: str
    whole: str


RELATIONSHIPS = Category(
    tasks="""
tell my partner I need a weekend alone
ask my husband to put his phone away at dinner
bring up the idea of living together
meet my girlfriend's parents for the first time
end a relationship that has simply gone flat
tell a friend I have feelings for her
forgive my sister for something she said years ago
spend less time with a friend who drains me
write my wife a letter for our tenth anniversary
talk with my boyfriend about having children
keep a long-distance relationship going for another year
apologise for something I did a decade ago
get to know my stepson better
ask my mother about her first marriage
tell my parents we are not coming for the holidays
invite my estranged brother to my birthday
set some rules for when my in-laws visit
stay friends with someone I used to date
start dating again after a divorce
tell my best friend that her brother is rude to me
share a bank account with the person I love
plan a surprise for my shy husband
ask my father for advice without starting a lecture
introduce my new partner to my teenage children
thank the aunt who practically raised me
tell someone kindly that there will be no second date
make more time for my grandmother
stop comparing my marriage to my parents' marriage
keep the spark alive with two small children around
admit to my partner that I was wrong
talk about money before the wedding
say no when my cousin asks me to be a bridesmaid
rebuild trust after I broke a promise
let my grown daughter make her own choices
""",
    task_frames=(
        "How do I {v}? | What's a gentle way to {v}? | How would you {v}?",
        "Is it a good idea to {v}? | Would it be fair of me to {v}? | Does it make sense to {v}?",
        "I'd like to {v}, but I keep putting it off. | I want to {v} and don't know where to begin.",
        "When is the right moment to {v}? | What should I think through before I {v}? | What might change if I {v}?",
    ),
    events="""
my partner and I laugh at completely different things
my sister hasn't called since our father's birthday
my boyfriend still keeps photos of his ex on his shelf
my best friend moved to another country last week
my wife wants a dog and I really don't
my mother reads every message of mine as a complaint
my husband never remembers what I told him the day before
my two closest friends have stopped speaking to each other
my girlfriend earns twice as much as I do
my son-in-law never says more than three words
my partner snapped at me in front of our guests
my brother forgot my fortieth birthday
my roommate and I have drifted apart without a quarrel
my date spent the whole evening talking about work
my father has started dating at seventy
my wife and I only ever talk about the children
my oldest friend didn't invite me to her wedding
my partner wants to move to the countryside
my parents keep comparing me to my cousin
my husband has taken up drumming in the living room
my ex asked whether we could have coffee
my girlfriend goes quiet whenever something upsets her
my aunt gives advice on everything I do
my partner prefers early mornings and I prefer late nights
""",
    event_frames=(
        "{S}. | {S}, and I'm not sure how I feel about it.",
        "{S}. What would you do next? | {S}. How should I bring it up?",
        "Is it petty to mind that {s}? | How big a deal is it that {s}?",
    ),
)

MONEY = Category(
    tasks="""
save up for a washing machine
pay off two credit cards at once
make a budget that I will actually keep
split the rent with someone who earns more than me
ask a friend to pay me back
save for a car without touching my holiday fund
live on one income for a year
cut my grocery bill by a third
lend my brother enough for a deposit
teach my teenager how bank accounts work
negotiate the price of a second-hand sofa
choose between a pension plan and paying down my loan
stop buying things online late at night
plan for the cost of a new roof
earn something on the side at weekends
keep track of small cash expenses
refuse when relatives ask me for money
compare two phone contracts
spend a small inheritance sensibly
give to charity on a tight budget
buy a first home with a friend
set a fair price for my handmade candles
ask my bank to waive a fee
plan a wedding for under three thousand
put money away for my niece's education
sell the things in my attic
live more cheaply in an expensive city
get out of a gym contract
share costs fairly on a group holiday
build a cushion for months without work
decide how much insurance I need
talk to my parents about their savings
go a whole month without eating out
buy quality shoes instead of cheap ones
""",
    task_frames=(
        "How do I {v}? | What's a simple way to {v}? | How would a careful person {v}?",
        "Is it sensible to {v}? | Is it worth the effort to {v}? | In my place, would you {v}?",
        "I've decided to {v}. What comes first? | I'm trying to {v}, and I'm not getting very far.",
        "What might I overlook when I {v}? | What's the hardest part if I want to {v}? | What would you advise"
        " if I had to {v}?",
    ),
    events="""
my heating bill doubled this winter
my salary is gone by the twentieth of each month
my friends all want to eat at places I can't afford
my landlord wants to raise the rent by a tenth
my card was charged twice for the same hotel
my car needs a repair that costs more than its value
my uncle left me his stamp collection
our joint account was overdrawn for the third time
I got a small bonus at work
I found an old savings book in a drawer
I paid for a course that I never finished
my employer has offered me shares instead of a raise
my insurance refused to cover the broken window
I earn more than my friends and it feels awkward
the tax office sent me a letter I don't understand
my daughter spent her allowance on a game in one day
my neighbour offered to buy part of our garden
I have been paying for a subscription I forgot about
my freelance client is two months late with the payment
our wedding is over and the bills are still coming
my grandmother keeps her money in a biscuit tin
I lent my coworker money and now he avoids me
my electricity provider went out of business
my wallet is full of gift cards I never use
""",
    event_frames=(
        "{S}. | {S}, and I haven't told anyone yet.",
        "{S}. What should I do first? | {S}. What are my options? | {S}. How would you handle it?",
        "A money question: {s}. How bad is that? | Talk me through this one: {s}.",
    ),
)

WORK = Category(
    tasks="""
ask my manager for more responsibility
give feedback to someone who is older than me
leave a job that everyone else thinks is perfect
come back to work after a year away
say no to a project when my week is already full
work with a person I don't like
tell my boss that I made an expensive mistake
run a meeting that ends on time
write a short summary of a long report
ask for a four-day week
train the person who will replace me
stay focused in an open office
change careers at forty-five
deal with a customer who shouts
get along with a team that has worked together for years
stop checking email at night
write a reference for a mediocre employee
negotiate my starting salary
turn down a job offer politely
lead people who used to be my peers
admit that I don't understand an assignment
take a real lunch break
make a boring task more bearable
present numbers to people who hate numbers
prepare for my yearly review
ask a colleague to stop humming
start a small business next to my day job
explain a gap in my CV
resign without burning bridges
get noticed for good work without boasting
organise a farewell for a retiring colleague
learn a new program that everybody else already knows
find a mentor in my field
keep my temper during a tense negotiation
""",
    task_frames=(
        "How do I {v}? | What's the best way to {v}? | What's a professional way to {v}?",
        "Is it wise to {v}? | Is this a reasonable moment to {v}? | What would speak against it if I wanted to {v}?",
        "I will soon have to {v}. | I'd like to {v}, but it makes me nervous. | Sooner or later I'll need to {v}.",
        "What mistakes should I avoid when I {v}? | What does it take to {v}? | What would help me {v}?",
    ),
    events="""
my colleague got the office I was promised
my boss answers every question with another question
our company is merging with its biggest rival
my new job turned out to be mostly spreadsheets
the intern knows more about the software than I do
I fell asleep in a video meeting
nobody in my team says good morning
my desk is right beside the coffee machine
a coworker keeps sending me messages at midnight
I was asked to write my own job description
our office is moving to the other side of the city
my manager praised me for work that someone else did
I have been in the same role for eleven years
the client changed the brief on the final day
my best friend at work has handed in her notice
we have three meetings a day about the same topic
I got two job offers on one afternoon
my team wants me to speak for them
a younger colleague has become my boss
I don't have enough to do at work
our printer decides every morning who may print
the company picnic is on my day off
my mind goes blank whenever the director walks in
I sent the offer to the wrong customer
""",
    event_frames=(
        "{S}. | {S}, and I keep thinking about it.",
        "{S}. What would you advise? | {S}. What's a good next step? | {S}. Should I speak to somebody?",
        "I could use an outside view on this: {s}. | How would you feel at work if you were me? Here's the thing: {s}.",
    ),
)

ETHICS = Category(
    tasks="""
keep the extra change that a cashier gave me
tell a small lie to spare someone's feelings
read a letter that was delivered to me by mistake
report a colleague who leaves early every day
eat meat when I know where it comes from
break a promise for the sake of a friend
give money to a person who may spend it on drink
tell a friend that her husband flirts with other people
use a photo I found online without asking
take a seat that somebody left for two minutes
return a gift and keep the money
let an old friend copy my homework
skip the queue because I am in a hurry
pretend to like a present
buy clothes that are suspiciously cheap
keep a secret that could hurt somebody
record a phone call without saying so
sell a car without mentioning the small fault
refuse to help a person who was rude to me
fly somewhere for just one weekend
spend money on luxury while others go hungry
read my teenager's messages
keep quiet when relatives make cruel jokes
take credit for an idea that came up in a chat
download a film I couldn't find anywhere else
park in a space reserved for families
leave a bad review for a struggling restaurant
take pens home from the office
change my vote to please my family
disobey a rule that makes no sense
tell a dying person only good news
keep a library book that nobody has asked for
throw away my neighbour's junk mail
offer a stranger less than his old car is worth
""",
    task_frames=(
        "Is it wrong to {v}? | Is it ever all right to {v}? | Should I {v}?",
        "I was tempted to {v} this morning. | Yesterday I had the chance to {v}, and I hesitated.",
        "How would you explain to a child whether it's fine to {v}? | What are the arguments for and against it"
        " if I want to {v}?",
        "Why does it feel so harmless to {v}? | Why might two honest friends disagree on whether I may {v}?",
    ),
    events="""
I saw a neighbour put his rubbish in the park
a friend asked me to lie to her employer
I promised to help two people on the same day
my brother wants our parents' house all for himself
I found a phone on a bench with no lock on it
a beggar refused the sandwich I offered him
I voted against something my best friend cares about
my teacher gave me a better mark than I earned
I overheard two strangers planning a nasty prank
my company pays women less for the same work
the waiter forgot to bill us for the wine
a cyclist scratched my car and rode off
I know who broke the vase, and someone else is being blamed
my grandfather's medals came from a war I don't approve of
I said I was ill so that I could stay in bed
our club wants to exclude a member for his opinions
a stranger paid for my shopping and left before I could thank her
I passed a person asleep in the snow and walked on
my cousin sells medicine that does nothing
my friend copied my design and won a prize for it
somebody confessed something to me that I wish I didn't know
I ate the last piece although it wasn't mine
my daughter wants to give all her toys away
a shop assistant was scolded because of my complaint
""",
    event_frames=(
        "{S}. | {S}, and it won't leave my mind.",
        "{S}. What is the right thing to do? | {S}. What do I owe to whom here? | {S}. How do you see it?",
        "Help me think this through: {s}. | Let me put a case to you: {s}. What matters most here?",
    ),
)

HEALTH = Category(
    tasks="""
fall asleep without my phone
drink less coffee in the afternoon
stretch my back after a long day at a desk
get up at six without an alarm
eat more vegetables when I don't like most of them
start exercising after years on the sofa
calm down before a dentist appointment
stop snacking late in the evening
talk to my doctor about something embarrassing
stay awake during a night shift
get over jet lag quickly
breathe properly when I am nervous
walk ten thousand steps a day
look after my eyes when I work on screens
get my strength back after a bad cold
cut down on sugar without feeling grumpy
take care of my knees as a runner
build some muscle at sixty
stop grinding my teeth at night
keep my energy up through the winter
rest on a day off without feeling guilty
nap without waking up groggy
choose a comfortable mattress
swim regularly with a full-time job
manage hay fever in spring
sit less during the day
cook healthy meals for one person
give up smoking after twenty years
deal with a snoring roommate
take better care of my skin in cold weather
remember to take my tablets on time
prepare my body for a long hike
relax my jaw and shoulders
go to bed at the same time every night
""",
    task_frames=(
        "How do I {v}? | What would help me {v}? | What's an easy way to {v}?",
        "Does it really matter whether I {v}? | How important is it to {v}? | What difference would it make to {v}?",
        "I'd like to {v}. Where should I start? | I keep meaning to {v}. | My sister says I should {v}.",
        "What tends to get in the way when I try to {v}? | What's a realistic goal if I want to {v}?"
        " | What should I change in my day to {v}?",
    ),
    events="""
I wake up every night at ten past three
my hands are always cold
I yawn through every afternoon meeting
my neck hurts after sleeping on the sofa
I dream about my old school again and again
my husband kicks in his sleep
I get a headache whenever the weather changes
my new glasses make the floor look tilted
I can't stand the taste of plain water
my stomach growls loudly in quiet rooms
I sleep badly in hotel beds
my legs are sore two days after every run
I eat much faster than everyone around me
my feet swell on long flights
I feel most awake around midnight
I have had hiccups since breakfast
my fitness tracker says I slept for two hours
I caught a cold right at the start of my holiday
my voice is gone after the concert
I crave salty food every evening
my son sleeps with the light on at fourteen
I get sleepy as soon as I open a book
my doctor told me to walk more
I sneeze each time I step into the sun
""",
    event_frames=(
        "{S}. | {S}, and I wonder about it.",
        "{S}. What can I try? | {S}. Is that common? | {S}. Any ideas?",
        "Should I mind that {s}? | A health question: {s}. What might be the reason?",
    ),
)

SOCIAL = Category(
    tasks="""
leave a party without making a fuss
join a conversation that is already going on
remember the names of ten new people
host a dinner for guests who don't know each other
say hello to a neighbour I have ignored for years
make friends as an adult in a small town
tell a story without losing the thread
cancel plans without hurting anyone
keep in touch with friends from university
talk to someone who only gives short answers
eat alone in a restaurant without feeling watched
give a toast in front of eighty guests
accept a compliment gracefully
turn down an invitation for the third time
start a book club on my street
calm two friends who argue about politics
ask a new acquaintance to meet again
talk less about myself at dinner
introduce a person whose name I have forgotten
break the silence in a lift
celebrate my birthday when I dislike being the centre of attention
reply to a message from three months ago
be a good guest for a whole week
spot when someone wants to end a chat
get out of a group chat politely
make a shy visitor feel at home
be funnier in company
say sorry for being late yet again
go to a wedding where I only know the groom
plan a reunion of my old class
handle a guest who will not go home
find people who like board games
tell a friend that his jokes have gone too far
spend New Year's Eve on my own
""",
    task_frames=(
        "How do I {v}? | What's a graceful way to {v}? | How could I {v}?",
        "Is it hard to {v}? | How much does it matter to be able to {v}? | Is it worth the trouble to {v}?",
        "I find it hard to {v}. | I'm not sure how to {v}. | It would be nice to know how to {v}.",
        "What makes it easier to {v}? | What's one small thing that would help me {v}?"
        " | What should I keep in mind when I {v}?",
    ),
    events="""
I waved at someone who was waving at the person behind me
nobody laughed at my joke last night
my friend brings her dog to every dinner
I talked far too much at the party
our group of friends has split into two camps
the whole table stared at their phones
my neighbour invited us over and then forgot about it
I called the host by the wrong name all evening
someone at the gym keeps giving me advice
my friend shows up an hour late to everything
I'm the only single person in my circle
my new acquaintances all know each other from school
a stranger told me her life story on the bus
I ran into my old teacher and didn't know what to say
my friends never ask me any questions
the guests stayed until three in the morning
I feel lonely although I meet people every day
my cousin posts pictures of me without asking
I was seated next to the loudest man at the wedding
we were invited to a costume party at short notice
my friend told everyone my news before I could
I blush whenever a group turns to look at me
the conversation dies whenever I join it
my upstairs neighbours had a party without us
""",
    event_frames=(
        "{S}. | {S}, and I wasn't prepared for it.",
        "{S}. How would you react? | {S}. What should I say next time? | {S}. Does it matter?",
        "Why does it stay with me that {s}? | Be honest with me: how awkward is it that {s}?",
    ),
)

PARENTING = Category(
    tasks="""
get my toddler to wear a coat
explain to my son why the moon follows us
limit screen time without a daily fight
raise two children who are very different
teach my daughter to lose gracefully
tell my kids that their hamster died
help a shy child make friends
get a baby to sleep in her own cot
share night feeds with my partner
talk to my teenager about alcohol
make a long car journey bearable for a three-year-old
handle a tantrum in the supermarket
let my ten-year-old walk to school alone
choose a name that works in two languages
raise my children with two languages
deal with grandparents who spoil the kids
get homework done without tears
find a babysitter I can trust
prepare my son for a baby sister
cook one dinner that all three children will eat
say sorry to my child after shouting
keep some time for myself as a single father
teach kids to tidy up after themselves
stop siblings from fighting over one toy
encourage a child who gives up quickly
answer questions about where babies come from
organise a sleepover for five eleven-year-olds
support my daughter through her first heartbreak
help my son pick a musical instrument
travel with a baby by train
give my child chores that he can manage
handle a child who lies about small things
let my teenager fail at something
stay patient at seven in the morning
""",
    task_frames=(
        "How do I {v}? | What's a calm way to {v}? | What would make it easier to {v}?",
        "What matters most when I want to {v}? | Does it always have to be a struggle to {v}?"
        " | How much does it matter, in the long run, to {v}?",
        "I'm struggling to {v}. | I didn't think it would be this hard to {v}. | My mother thinks it's easy to {v}.",
        "What should I avoid when I try to {v}? | What's a first small step to {v}? | What would an experienced"
        " parent tell me if I want to {v}?",
    ),
    events="""
my daughter only eats food that is white
my son talks to an imaginary dragon
our baby laughs at the washing machine
my teenager came home with green hair
the twins refuse to sleep in separate rooms
my six-year-old asked me what happens after we die
my stepdaughter calls me by my first name
our neighbours' children have no bedtime at all
my son was not picked for the school team
my daughter wants to become a magician
our four-year-old bites when she is tired
my son cries when the music is sad
the kindergarten teacher says my boy is too quiet
my daughter gave her lunch to a pigeon
our eldest has moved out and the house feels large
my kids argue over who presses the lift button
my toddler has discovered the word no
my children would rather be with their father
our baby's first word was the name of the cat
my son has collected two hundred stones in his room
my thirteen-year-old rolls her eyes at everything
my daughter's best friend is a bad influence
my husband and I disagree about pocket money
our son wrote a letter to the mayor about the swings
""",
    event_frames=(
        "{S}. | {S}, and I don't quite know what to think.",
        "{S}. How should I respond? | {S}. Is that just a phase? | {S}. What would you do as a parent?",
        "Is it normal that {s}? | Tell me what you make of it as an outsider: {s}.",
    ),
)

SCHOOL = Category(
    tasks="""
take notes during a fast lecture
revise for three exams in one week
ask a question in a class of two hundred
choose between history and biology
write the first sentence of an essay
work in a group with lazy classmates
learn vocabulary on the bus
read a difficult book to the end
give a presentation without reading from the slides
study at home with two noisy brothers
understand fractions after years of avoiding them
get better at mental arithmetic
pick a topic for my final project
tell my parents that I am changing my subject
make a study plan I can stick to
write an email to a strict professor
memorise a long poem
come back to university after a break
concentrate for longer than ten minutes
find a quiet place to study on campus
help a classmate who is falling behind
write a summary in my own words
use flashcards properly
learn a language on my own
deal with a teacher who has favourites
get through a subject that bores me
prepare for an oral exam
take a gap year before college
improve my handwriting
stop leaving assignments until the night before
join a school club as the new kid
understand a poem that seems to make no sense
live in a student flat with five others
combine studying with an evening job
""",
    task_frames=(
        "How do I {v}? | What's a good method to {v}? | What's a clever way to {v}?",
        "Is it worth it to {v}? | How hard is it to {v}? | Do I really have to {v}?",
        "I would like to {v}, ideally before the term ends. | I've been wondering how to {v}.",
        "What's the first thing to do if I want to {v}? | What would a kind teacher say if I told her that I want to {v}?"
        " | How can a friend help me {v}?",
    ),
    events="""
my thesis adviser hasn't answered in a month
I understand the lesson until I get home
our maths teacher talks to the blackboard
my lab partner does everything before I arrive
I got a top mark for an essay I wrote in an hour
my classmates think I study too much
our school is closing its library
I chose a degree to please my parents
my notes are longer than the textbook
I moved to a new school in the middle of the year
the exam had nothing to do with the course
my group presentation is tomorrow and one of us is ill
I read every chapter and remember nothing
our teacher retired and the class misses him
my roommate plays trumpet during exam week
I wrote the wrong date on every page of the test
my favourite subject has the worst teacher
I was the only one in class who liked the novel
my little sister does better in maths than I do
the school play has more actors than parts
I failed chemistry by two points
my dictionary and my teacher disagree
we have to dissect a flower tomorrow
my scholarship depends on my grade in statistics
""",
    event_frames=(
        "{S}. | {S}, and term ends soon.",
        "{S}. What do you suggest? | {S}. What should I do about it? | {S}. What can I learn from that?",
        "How can I turn this into something useful? Here's my situation: {s}."
        " | Would you complain if this was you? I mean, {s}.",
    ),
)

HOBBIES = Category(
    tasks="""
learn the ukulele from videos
draw faces that look alive
start a small herb garden on a balcony
take better photos with an old phone
join a choir without reading music
knit a scarf as a complete beginner
write a short story of one page
build a model railway in a tiny flat
paint with watercolours outdoors
restore an old wooden chair
get into birdwatching
play chess against people who are much better
learn to juggle three balls
keep a sketchbook every day
bake bread without a machine
collect records without filling the house
learn the names of the stars
fish in a river for the first time
sew a simple skirt
grow chillies indoors
make a short film with friends
solve cryptic crosswords
dance salsa with two left feet
start a podcast about local history
climb indoors although I am afraid of heights
carve a spoon from a branch
press flowers in a way that keeps their colour
play the piano again after twenty years
learn magic tricks for children
brew my own ginger beer
write songs on a cheap guitar
repair bicycles for friends
make pottery without a wheel
finish one of my many half-done projects
""",
    task_frames=(
        "How do I {v}? | What do I need in order to {v}? | What's a pleasant way to {v}?",
        "How hard is it to {v}? | How long does it take to {v}? | Am I too old to {v}?",
        "I want to {v} this summer. | Lately I've been dreaming about it: I'd like to {v}. | My plan is to {v}.",
        "What makes it so satisfying to {v}? | What should I watch out for when I {v}? | What mistake should I try"
        " not to make when I {v}?",
    ),
    events="""
my sunflowers are taller than the fence
my paintings all end up looking brown
I bought a telescope and it has been cloudy ever since
my pottery cracked in the kiln
my chess partner takes back every second move
I own more yarn than I could ever knit
my photos are either too dark or too bright
our band has four guitarists and no drummer
my bread looks like a brick
I lost interest in running after one good summer
my stamp album was chewed by the puppy
our book club only talks about holidays
I always stop reading thirty pages before the end
my harmonica annoys the whole building
my model ship sank in the bathtub
I found my grandmother's old sewing machine
my roses have been eaten by deer
my garden gnome went missing and came back painted
I won third prize in a pumpkin contest
my fish tank has turned green
I knitted a jumper with three sleeves
my friends want me to sing at their wedding
my crossword has one empty square left
my kite is stuck in the tallest tree of the park
""",
    event_frames=(
        "{S}. | {S}, and my family has noticed.",
        "{S}. What now? | {S}. What did I do wrong? | {S}. What would you try?",
        "I have a hobby question: {s}. Is that my fault? | You'll never believe it, but {s}.",
    ),
)

FOOD = Category(
    tasks="""
poach an egg without vinegar
cook rice that doesn't stick
use up a whole pumpkin
make soup from leftovers
get crispy potatoes in the oven
cook fish without filling the flat with the smell
plan five cheap dinners
make a birthday cake without eggs
pack a lunch that survives a hot train
cook for a vegetarian and a butcher at the same table
chop an onion without crying
make good coffee without a machine
bake with children who want to help
eat well on a camping stove
make a sauce that doesn't turn lumpy
cook beans from scratch
feed twenty people from two pots
keep herbs fresh for longer than two days
make pancakes for one
grill vegetables that are not soggy
learn to like olives
freeze fruit in summer for the winter
bake bread at a high altitude
cook with what a tiny village shop has
roast a chicken for the first time
season food without much salt
make noodles by hand
build a cheese board on a small budget
cook a dinner that reminds me of my childhood
make lemonade less sweet
replace butter in biscuits
cook something warm in ten minutes
try a new recipe for important guests
host a breakfast that isn't just bread
""",
    task_frames=(
        "How do I {v}? | What's your method to {v}? | What's the trick if I want to {v}?",
        "Is it difficult to {v}? | Is there a simple way to {v}? | Is it worth the bother to {v}?",
        "I'd like to {v} this weekend. | Somebody asked me to {v}. | I tried to {v} last week and failed.",
        "What should I have in the kitchen if I want to {v}? | What might go wrong when I {v}? | How would my grandmother {v}?",
    ),
    events="""
my sourdough smells like nail varnish
my soup is far too salty
the oven in our holiday flat has only one temperature
my guests arrive in an hour and the roast is still raw
I have eleven lemons and no plan
my curry tastes flat no matter what I add
the recipe calls for a spice I have never heard of
my cheesecake has a crack right through the middle
my husband puts ketchup on everything
our toaster burns one side and ignores the other
my friend says she can taste metal in my tea
my daughter has announced that she is vegan
I dropped the salad on the way to the table
our fridge is full and there is nothing to eat
my jam never sets
my neighbour brings me courgettes every day
I bought cheap knives and regret it
the market had nothing but cabbage today
my pizza dough keeps shrinking back
I forgot the sugar in the apple pie
my mashed potatoes turned to glue
our favourite restaurant has a new chef
my bananas always go brown on the same day
I am tired of eating the same five meals
""",
    event_frames=(
        "{S}. | {S}, and dinner is at seven.",
        "{S}. What can I do? | {S}. Can this be saved? | {S}. What would you cook now?",
        "Quick kitchen question: {s}. Why is that? | I need a cook's opinion: {s}.",
    ),
)

HOME = Category(
    tasks="""
hang a heavy picture on a plaster wall
get the smell of smoke out of curtains
clean windows without streaks
make a rented flat feel like mine
sort ten years of papers
agree on bathroom times with four flatmates
keep a hallway tidy with three children
paint a ceiling without ruining the floor
choose a sofa for a narrow room
fix a door that scrapes the floor
get rid of moths in the wardrobe
store winter clothes in a small flat
clean an oven that has been ignored for years
find the right light for a dark corner
declutter before we move
keep the bedroom cool during a heatwave
bleed a radiator
make peace with the neighbours downstairs
make a guest room out of an office
remove old stickers from a window
choose plants for a room without sun
set up a small workshop in the cellar
do the laundry for six people
stop the taps from dripping
choose a colour for the front door
clean a rug that is too big for the machine
insulate an old wooden window
organise a kitchen with hardly any cupboards
get ready for a bathroom renovation
put together a large wardrobe
soundproof a flat above a bar
divide the housework more evenly
let go of furniture I inherited
prepare the house for a long absence
""",
    task_frames=(
        "How do I {v}? | What's the easiest way to {v}? | What would it take to {v}?",
        "Can I {v} without help? | How much time would I need to {v}? | Is there a clever way to {v}?",
        "On Saturday I'm going to {v}. | My flatmate wants me to {v}. | I've been putting it off, but I have to {v}.",
        "What do I need to know before I {v}? | What could go wrong if I {v}? | What would you do first in order to {v}?",
    ),
    events="""
our kitchen light flickers whenever it rains
the neighbour's ivy is growing through our window
my sofa doesn't fit through the door
there is a strange smell in the hallway
our cellar is full of things that nobody wants
my flat is freezing although the heating is on
the cat has scratched the new armchair
our landlord has painted the stairwell orange
the washing machine walks across the floor
my bookshelf leans a little more each week
a pipe knocks in the wall every evening
our garden chairs blew into the pond
the previous owner left a piano behind
my bedroom faces a street lamp
the carpet shows every crumb
we have four clocks and each shows another time
my balcony is covered in pigeon feathers
our doorbell plays a tune that nobody can stand
I locked myself out in my slippers
my desk is buried under paper again
the people above us move furniture at midnight
our new table wobbles on every floor
there is a mushroom growing in the shower
my keys are never where I left them
""",
    event_frames=(
        "{S}. | {S}, and visitors are coming on Sunday.",
        "{S}. How do I fix it? | {S}. Whom should I call? | {S}. What would you do about it?",
        "How annoyed should I be that {s}? | Here's something about my home: {s}. Does it bother other people as well?",
    ),
)

TRAVEL = Category(
    tasks="""
pack for two weeks with only a small bag
spend a day in a city where I don't speak the language
travel alone for the first time
cross the country by train
find a quiet beach in August
keep a travel diary
see a big museum in two hours
sleep on a night bus
plan a road trip with friends who want different things
fly with a baby on my lap
visit a place I loved as a child
eat well on the road without spending much
avoid the crowds in a famous town
rent a car abroad
walk a long trail for several days
choose between the mountains and the sea
make the most of a long layover
travel with my elderly parents
take a holiday without my phone
get to know local people on a trip
cycle along a river for a week
pick a souvenir that won't gather dust
work from another country for a month
find my way without a map app
stay with strangers through a home exchange
take my dog on a ferry
go camping in the rain
explain to my boss that I need three weeks off
plan a honeymoon at short notice
see the northern lights
bring home spices from a market
learn twenty phrases before a trip
spend a holiday at home
get used to daily life again after months abroad
""",
    task_frames=(
        "How do I {v}? | What's a relaxed way to {v}? | What's the secret if you want to {v}?",
        "Is it a good idea to {v}? | Is it harder than it sounds to {v}? | Does it make sense to {v}?",
        "This year I'm going to {v}. | I've always wanted to {v}. | My friends talked me into it: I'm going to {v}.",
        "What should I prepare if I want to {v}? | What will surprise me if I {v}? | What's worth knowing before I {v}?",
    ),
    events="""
our train stopped in a field two hours ago
my suitcase went to a different country
the hotel gave our room to somebody else
I took the wrong ferry and ended up on another island
my travel companion wants to plan every minute
it has rained on each day of our holiday
my passport runs out a week before the trip
the guide told us a story that can't be true
we only have one day in Rome
I left my favourite jumper on the plane
my hostel neighbour sings in his sleep
our tent is missing one pole
I was offered a job in the village where we stayed
the restaurant menu has no prices on it
my friend has booked a trip for us both without asking
the museum I came for is closed until spring
we are stuck at the airport until tomorrow
the map shows a bridge that isn't there
my holiday photos all show the same sunset
a stranger on the train shared her lunch with me
I came home from abroad and everything seems small
our rental car smells of fish
my seat on the plane is between two crying babies
we met our neighbours on the far side of the world
""",
    event_frames=(
        "{S}. | {S}, and I have to smile about it.",
        "{S}. What would you do? | {S}. How do I make the best of it? | {S}. What now?",
        "A note from the road: {s}. Any thoughts? | Should I be cross or amused that {s}?",
    ),
)

WHIMSICAL = Category(
    tasks="""
teach a cloud to whistle
knit a scarf for a giraffe
open a hotel for snails
hide an elephant in a small flat
build a bridge out of spaghetti
train a goldfish for the circus
start a newspaper for cats
write a letter to the year 3000
carry moonlight home in a bucket
convince a penguin to try jogging
plan a picnic on Saturn
run a bakery for ghosts
invent a new day of the week
have tea with a very polite bear
sell umbrellas to fish
paint the wind
apologise to a tree
organise a race between shadows
give a concert for potatoes
move a lighthouse by bicycle
translate the language of kettles
raise a very small dragon in a teapot
build a library under the sea
swap voices with a crow for a day
teach chess to a flock of sheep
throw a birthday party for a river
write the rules for a pillow fight league
persuade the sun to sleep in
keep a secret from a parrot
design a hat for a mountain
run a school for left socks
go on holiday with a vending machine
weigh a rainbow
interview the oldest stone in the garden
""",
    task_frames=(
        "If you had to {v}, where would you begin? | How would you {v}?",
        "What would be the hardest part of trying to {v}? | Why would anyone want to {v}?",
        "Describe the first person who ever tried to {v}. | Give me a three-step plan to {v}.",
        "My niece wants to {v}. What do I tell her? | What would the neighbours say if I tried to {v}?",
    ),
    events="""
my left shoe has started giving orders
the moon asked to borrow my ladder
all the clocks in town are running backwards
a duck has moved into my office
my shadow wants a day off
the village well answers questions on Thursdays
my umbrella is afraid of rain
the statues in the park have changed places
a very small king lives in my glove box
my soup has opinions about music
the wind returned my hat with a note in it
our cat has been elected mayor
the stairs in my house lead somewhere new each night
my pencil only writes the truth
every door in the street opened at the same moment
a snail overtook me on the way to work
my reflection has a better haircut than I do
the colour blue has gone missing
an owl left its suitcase on my porch
the radio plays songs from next summer
my garden gnome speaks only in riddles
gravity takes a break every afternoon at four
a giant has asked me for a cup of sugar
the library now lends out memories
""",
    event_frames=(
        "{S}. | {S}, and nobody else seems to notice.",
        "{S}. What should I do? | {S}. How would you explain it? | {S}. Please advise.",
        "Tell me the story behind this: {s}. | What happens next, now that {s}?",
    ),
)

TECHNOLOGY = Category(
    tasks="""
choose a laptop for writing and nothing else
explain the cloud to my grandfather
make my old phone last another two years
spend less time on social media
organise twenty thousand photos
learn to program at fifty
pick passwords I can remember
set up wifi in a house with thick walls
get my parents to use video calls
stop getting so much spam
switch from one email provider to another
protect my child's tablet
back up my computer without thinking about it
type faster
decide whether to buy an electric car
clean a sticky keyboard
keep my inbox empty
delete an account I no longer use
teach my father to use online banking
find an app that tracks bird songs
print photos that don't look pale
live without a smartphone for a week
tell a real message from a scam
build a simple website for our choir
turn off notifications without missing something important
repair headphones that work on one side only
use a spreadsheet for the first time
talk to my kids about what they post
recycle a drawer full of old cables
choose between an e-reader and paper books
record my grandmother's stories
make a slideshow for a funeral
share files with someone who hates computers
get used to a new keyboard layout
""",
    task_frames=(
        "How do I {v}? | What's a straightforward way to {v}? | How would you {v}?",
        "Is it hard to {v}? | Does it pay off to {v}? | How much time would I need to {v}?",
        "I'd like to {v}, but I'm no expert. | One of these days I'm going to {v}. | I'm about to {v}.",
        "What should I know before I {v}? | What might I get wrong when I {v}? | Who could help me {v}?",
    ),
    events="""
my laptop fan sounds like a hairdryer
my phone autocorrects my own name
the smart lamp in our kitchen turns itself on at night
my mother answers every email in capital letters
my computer wants an update whenever I'm in a hurry
our voice assistant only obeys my daughter
I accidentally liked a photo from seven years ago
my new watch tells me to stand up during funerals
my hard drive makes a clicking noise
the self-checkout never believes that I have bagged the item
I have nineteen chargers and none of them fits
my car sends me messages about its feelings
our family chat has four hundred unread messages
I forgot the password for my password manager
my headphones die in the middle of every call
the navigation system led us into a field
my photos have vanished from the cloud
my son can code better than his teacher
the printer at the library took my last coin
my screen has one bright green line
I read the news on my phone before I'm fully awake
my robot vacuum is stuck under the sofa again
the website says that my surname is too short
I miss the sound of my old typewriter
""",
    event_frames=(
        "{S}. | {S}, and I've restarted everything twice.",
        "{S}. What should I try? | {S}. How do I deal with that? | {S}. Why is that?",
        "What does it say about modern life that {s}? | Explain this to me slowly, please: {s}.",
    ),
)

COMMUNITY = Category(
    tasks="""
start a street party in our road
get more people to come to the town meeting
set up a small lending library at the bus stop
welcome a new family to the building
help an elderly neighbour without intruding
join the volunteer fire brigade
organise a clean-up of the river bank
persuade the council to plant trees
settle a quarrel about parking spaces
run a repair café in the church hall
find volunteers for a food bank
share one lawnmower among eight houses
speak in front of the local council
bring old and young people together
revive a village choir
turn an empty shop into something useful
keep a community garden going
make our crossing safer for schoolchildren
thank the person who sweeps our street
start a petition about the late bus
teach evening classes for newcomers
raise money for a new playground
get teenagers interested in local history
deal with noise from the new bar
plan a flea market in the courtyard
report a broken street lamp
set up a walking group for retired people
keep our tiny cinema alive
give away what our garden produces
form a tenants' group in our block
make the neighbourhood newsletter less dull
look after the graves of people with no family
invite the quiet neighbour on the third floor
make peace between dog owners and cyclists
""",
    task_frames=(
        "How do I {v}? | What does it take to {v}? | What's a friendly way to {v}?",
        "Is it my place to {v}? | Would it do any good to {v}? | Why should anybody bother to {v}?",
        "Some of us want to {v}. | I've offered to {v}. What have I let myself in for? | I feel like it's time to {v}.",
        "Whom should I talk to if I want to {v}? | What would be our first step to {v}? | How long might it take us to {v}?",
    ),
    events="""
our library is only open two days a week
somebody keeps stealing the flowers from the roundabout
my street has no pavement on one side
the council wants to sell the old swimming pool
our neighbour plays the bagpipes on Sundays
the last baker in the village is closing
nobody turns up at the residents' meeting
a fox has moved into the school yard
the new bus route goes right past our bedroom
the village is split over the wind turbines
an old man feeds two hundred pigeons below our window
the church bells ring every quarter of an hour
our volunteer group has ten leaders and no helpers
teenagers meet in the bus shelter every night
the bench by the river was taken away
a film crew has blocked our road for a week
the town has named a square after a man nobody remembers
our building has a noticeboard full of angry notes
the mayor promised us a playground three years ago
the market has moved and half the stalls are gone
someone in my block cooks wonderful food every evening
our annual fair has been rained off again
the postwoman knows everyone in the valley by name
two clubs want the same hall on the same night
""",
    event_frames=(
        "{S}. | {S}, and people here talk of little else.",
        "{S}. What could we do? | {S}. Is there anything to be done? | {S}. How would you feel about it?",
        "What does it mean for a neighbourhood that {s}? | How much should I care that {s}?",
    ),
)

CATEGORIES = (
    RELATIONSHIPS,
    MONEY,
    WORK,
    ETHICS,
    HEALTH,
    SOCIAL,
    PARENTING,
    SCHOOL,
    HOBBIES,
    FOOD,
    HOME,
    TRAVEL,
    WHIMSICAL,
    TECHNOLOGY,
    COMMUNITY,
)


# Prompts that stand alone.
ONE_OFFS = """
What makes a house feel like home?
Tell me about a sound you would miss if it disappeared.
If you could add one hour to the day, where would you put it?
Why do we wave goodbye?
Describe rain to someone who has only ever lived in a desert.
What is the best way to spend the first hour of a Saturday?
I finished my book last night and now I feel a bit empty.
Which smell takes people back to childhood most quickly?
How would you explain patience to a five-year-old?
My tea has gone cold again.
What should every kitchen drawer contain?
Why do some songs get stuck in our heads?
Give me a reason to go for a walk this evening.
Is a tomato a fruit, and does it matter?
What would a museum of ordinary things look like?
How do you know when a friendship is over?
I have a free afternoon and no plans at all.
What do you say to someone who has just moved to your town?
If trees could talk, what would they complain about?
What's the difference between being alone and being lonely?
Write me two sentences about the sea in winter.
Why do old photographs make us quiet?
What can a person learn by washing dishes?
How do I know which advice to listen to?
Name a rule that everybody breaks.
What's worth waking up early for?
My window looks out on a brick wall.
Should children be paid for good marks?
What are shoelaces trying to tell us when they come undone?
How many friends does a person need?
Which everyday object would be hardest to explain to someone from the year 1500?
I can't find a single matching pair of socks.
What would you put on a shelf that is only ten centimetres wide?
Is it better to arrive early or exactly on time?
Explain why bread and butter is enough.
What happens to all the lost umbrellas?
How should a person spend their last day in a city they love?
Why do people talk to their plants?
My neighbour greets me in a different language every morning.
What would you put in a box to be opened in a hundred years?
Are there any good reasons to keep a diary you never reread?
What's a fair way to choose who gets the last biscuit?
Tell me how a letter gets from one country to another.
How do you make a long week feel shorter?
I told a joke at work and explained it, which made it worse.
Which season is the most underrated?
What makes a town square pleasant to sit in?
Can a person be too polite?
If my cat could write a review of me, what would it say?
How does one learn to like their own company?
What would you ask a person who is a hundred years old?
My alarm rang, I turned it off, and now it's noon.
Why is it so hard to throw away a gift?
What should I do with a jar of buttons?
Which is the better invention, the bicycle or the spoon?
What do you think about when you can't do anything else?
How would a fish describe a bath?
Is it all right to change your mind in front of everyone?
Recommend something to do on a train without a phone.
What's the kindest thing a stranger can do?
My grandmother says that nothing tastes the way it used to.
When does a hill become a mountain?
How would you celebrate the first day of spring?
Why do we clap when we like something?
What's the right length for a speech at a birthday?
Describe a perfect bench in a park.
I'm the last one awake in the house.
What do postcards say that messages can't?
Would life be easier without mirrors?
How do you choose a name for a boat?
What is the opposite of a busy street?
Tell me something worth knowing about bees.
My shoes are wet and the day has only begun.
Should we always say what we think?
What makes some people easy to talk to?
How do I draw a horse that looks like a horse?
Is there an art to doing nothing?
What would a polite volcano say before it erupts?
Why does food taste better outside?
If you were a colour, how would you spend the weekend?
What do we owe to people we'll never meet?
My daughter asked me where the wind goes when it stops.
How would you spend fifty euros on someone you don't know?
Which habits are worth passing on?
What's a good question for a first conversation?
I keep starting things and not finishing them.
Do animals find us strange?
What's the nicest word in the language?
How does a day become a good day?
Can you miss a place you've never been to?
What should be written on a sign at the edge of a forest?
My father still irons his handkerchiefs.
Why are weekends shorter than weekdays?
What does it mean to be on time?
How would you explain music to a stone?
Tell me what you'd pack for a picnic with someone you've just met.
Is it worth learning to whistle?
Which job would you invent if you could?
What makes a queue bearable?
The leaves are falling and I haven't raked a single one.
How can you tell that a story is about to end?
Who decides what is beautiful?
What would you do with an empty shop for one month?
Why do we find it easier to be kind to strangers?
My bus driver sings, and the whole bus has started to hum.
What's the best advice you can give in five words?
How do people fall out of the habit of writing letters?
If you had to keep only one room of a house, which would it be?
What is silence good for?
Should a birthday cake have a candle for every year?
Tell me about a small pleasure that costs nothing.
What do we mean when we say that time flies?
How do lighthouse keepers stay sane?
I bought too many apples.
What makes a good map?
Is a promise to yourself a real promise?
What's the politest way to wake somebody up?
Why do we keep things that are broken?
How would you describe Tuesday as a person?
My coffee machine and I are not on speaking terms.
What's the smallest change that makes a room better?
Can you teach me a game that needs only paper?
Which animal would make the best neighbour?
How should one behave in a library?
What would happen if everyone told the truth for a day?
Do you think robots will ever enjoy a sunset?
My sister has asked me to choose the paint for her front door.
What can you tell about someone from the way they walk?
Where do good ideas come from?
How would you persuade a child that spinach is fine?
What's something adults pretend to understand?
Is it still a hobby if you're bad at it?
Describe the taste of water.
Why do we say bless you when somebody sneezes?
I walked into the kitchen and forgot why.
How much stuff does one person need?
What would a letter from your desk to you say?
Which chores are secretly enjoyable?
How do you get a song out of your head?
What should I plant in front of a house that nobody visits?
Should we tell our age when asked?
My car, my phone and my watch all show different times.
What's the difference between a house and a hut?
What do you do with praise you don't deserve?
Invent a holiday that the world needs.
How long should a nap be?
What's a good use for an old ladder?
Why is it that yawning is catching?
If you could ask your future self one thing, what would it be?
What does a good neighbour do?
My plant has one new leaf, and I'm far too proud.
When is it better to walk away?
How does a person become brave?
What would you serve at a dinner for six poets?
Is it rude to correct someone's grammar?
Tell me about the best kind of chair.
How do I make a Monday feel less like a Monday?
What keeps old couples laughing?
What would you tell a person on their first day at work?
Why do cats sit in boxes?
My hat blew into the river and floated away like a little boat.
Which is harder, to begin or to end?
What's a sensible way to divide a garden between two families?
How many keys are too many?
Do we still need zoos today?
What does the perfect breakfast look like?
How would you describe the internet to a medieval monk?
I've been asked to bring a salad.
What makes a joke work?
Should everyone learn to cook?
Is it possible to be both ambitious and content?
What would you put on the first page of a cookbook?
Why do we take photographs of food?
How does one get used to a new haircut?
What's the right thing to say at a funeral?
Give me an idea for a drawing.
My dog is afraid of the broom.
What can cities learn from villages?
How would you explain the seasons with an orange and a lamp?
Which questions have no good answer?
Is a plan better than a mood?
What do you do when the power goes out for an evening?
Tell me a gentle bedtime story in four sentences.
What's the best thing about getting older?
How do you fold a fitted sheet?
Why do people collect stones?
If a day had a colour, what would yesterday's be?
My lunch was stolen from the office fridge.
What makes a person's handwriting beautiful?
Should we go to the sea or stay in the garden?
How do you stop worrying about what other people think?
What would you name a street with only one house?
Does practice really make perfect?
I've promised to write a poem for a colleague who is retiring.
How do birds decide who goes first?
What is a good reason to say no?
Which of the five senses do we use too little?
What's the point of small talk?
How would you spend a year without money?
Why do we love ruins?
My mother wants to learn how to skateboard.
What do you call the feeling of finding a seat on a full train?
How would you describe your ideal village?
Is there such a thing as a bad question?
What should we do about the old piano nobody plays?
When did you last change your mind about something?
Tell me how to make a paper boat.
What's the use of a garden gate without a fence?
How do you know that soup is ready?
Are there too many choices in the supermarket?
My brother-in-law has written a novel and wants my honest opinion.
What would a wise old tortoise say about rushing?
How can a shy person lead a team?
What's the most useful knot?
Why is it so pleasant to watch a fire?
Should the last person out of the office water the plants?
What do you think is the most human of all sounds?
How do I write a note to the people who will buy my house?
Which fruit has the best design?
I would like to be less serious.
What makes a street safe at night?
Can a machine be creative?
How do you share one umbrella among three people?
What would you do if the whole town lost its voice for a day?
Why do we dream of flying?
What's a good toast for two old friends?
My new neighbours have a rooster.
How do you make a guest laugh before the soup?
Is it better to read one book ten times or ten books once?
What should a person know before getting a tattoo?
Tell me something surprising about potatoes.
How would you teach someone to listen?
What do we lose when we hurry?
Which word do people use too often?
My grandfather kept every ticket he ever bought.
What's the best way to cross a muddy field?
How do I explain my job to my grandmother?
Where would you hide a birthday present in a flat with no cupboards?
Why does the last day of a holiday feel so odd?
What does success mean on an ordinary Wednesday?
Should shops close on Sundays?
How do you make friends with a cat that belongs to somebody else?
What's more important in a team, talent or trust?
If you could bring back one extinct animal, which would it be?
I have three hours to get to know this city.
What makes a good teacher stay in your memory?
How can I be on time without being early?
What would you say in a voice message to yourself as a child?
Is there a polite way to eat spaghetti?
Why are some people always cold?
What should I cook for somebody who has had a hard day?
How do people get over stage fright?
Which inventions have made life worse?
Describe a storm without using the word rain.
My son wants to know who invented homework.
What does it take to be a good grandparent?
How would you make a waiting room friendlier?
What's the first thing you notice about a room?
Do opposites really attract each other?
Why do we forget dreams so quickly?
How do you choose a melon, a friend and a pair of shoes?
What might a snail think of a bus?
I'm allowed to paint one wall in any colour I like.
What's the best seat in a theatre?
Should you lend books to anyone who asks?
How do small towns keep young people?
What's a good way to remember a person who has died?
Which sport would be funniest if the players were a bit drunk with sleep?
Is it cheating to use a recipe?
What would the world be like without music?
How do I ask for help without feeling small?
Tell me about the life of a raindrop.
What do you do with the second half of an onion?
Why do teenagers sleep so long?
My boss ends every sentence with a question mark.
What's the difference between wisdom and knowledge?
How would you furnish a treehouse?
What can we learn from ants?
Should museums be free for everybody?
What's the best excuse for leaving early?
How do you find out what you're good at?
Who has the right of way on a narrow path?
I want to give my street a present.
Why is the middle seat the worst?
What would you write on a wall if it was allowed?
How does a quarrel begin?
What is a fair punishment for a stolen cookie?
Do we need more holidays or shorter days?
How would you describe snow to a camel?
What makes a shop worth going back to?
My watch stopped and I enjoyed the day much more.
Which skills will still matter in a hundred years?
How do you cool down after shouting?
How do I pick a good spot for a tent?
Why does everyone love otters?
What would you change about birthdays?
Is it ever too late to learn an instrument?
What does a country smell like?
How do you make a decision when both options are fine?
Tell me what a wall between two gardens might have overheard.
What should I know before adopting an older dog?
Why do we shake hands?
My flatmate labels everything, even the salt.
How do people sleep in noisy cities?
What would be a good motto for a family of night owls?
What does freedom look like on a small budget?
Which is the best month to change your life?
How can a town be kind to people who can't see?
Are you ever finished with a garden?
What would a thank-you note from the sea say?
Should I answer honestly when the hairdresser asks if I like it?
How do you carry a cake on a bicycle?
What makes an evening memorable?
My friend collects other people's shopping lists.
What's the right number of cushions?
How would you run a school without bells?
Do we choose our friends or do they just happen?
What do people mean when they say they need space?
I haven't seen the sun in eleven days.
Why do towels get rough?
What's the fairest way to pick a team captain?
How do I tell a story so that children sit still?
What's your view on people who talk in the cinema?
Which habits make a home quieter?
What would you do with a field of wild flowers?
How do you thank a whole hospital ward?
Is being bored good for children?
Describe what a market sounds like at six in the morning.
What are the signs of a good restaurant?
My aunt has sent me a jumper that would fit two of me.
How do you pass the time on a long hospital night?
Why do so many stories begin in a forest?
What would you ask the person who designed your chair?
What's the best way to watch the stars in a city?
How honest should a reference be?
What could replace the handshake?
Do plants prefer Mozart or silence?
I have been given the task of cheering up my uncle.
What does it take to forgive yourself?
How would a detective find out who ate the cheese?
What's worth repairing and what isn't?
Why is it hard to sing in front of others?
Which games should everyone know?
How do I settle in after moving for the third time in two years?
What do you see when you close your eyes?
Should there be a limit on how much one person may own?
What's a good hiding place for a house key?
Tell me how you would describe colours over the phone.
How does trust between two people begin?
My toast fell on the buttered side twice this week.
What would you like to hear at the end of a hard day?
Is it fair to judge people by their shoes?
Why do we like sitting by windows?
How do people in cold countries stay cheerful through the winter?
What can be done with a very long hallway?
What would be in your ideal sandwich?
How do you raise a child to be curious?
Are lists helpful or just comforting?
What kind of weather suits a farewell?
My neighbour and I have been swapping recipes through the letterbox.
What's a modest goal for the coming month?
Who should pick up the bill when cousins meet?
How would you redesign the common fork?
What do you do when two friends ask you to take sides?
Why does a new notebook feel so promising?
What's a gentle way to tell someone they have spinach in their teeth?
What does a village need most, a doctor, a pub or a school?
How would you spend a week in a cabin without electricity?
Is it better to rent or to own a piano?
Tell me about a bridge, any bridge.
What are good manners on a bicycle?
How do you write about someone you love?
My class wants to surprise our teacher on her last day.
What's the most overrated piece of advice?
Why is it so difficult to do nothing for ten minutes?
What does a stranger need to know about your kitchen?
Should we keep pets in small flats?
How do you tell the difference between tired and sad?
What would you build out of a thousand matchboxes?
Where does courage go when we need it?
I've been talking to the same pigeon for a week.
What makes a present personal?
How would you spend the evening if all the screens in the world went dark?
Is there a good way to split up with a hairdresser?
What's the best place to read?
Why do we whisper in churches and museums?
What kind of person names their car?
How do you decide what to keep when you move?
What do clouds look like from above?
My son says he's too old for bedtime stories, yet he stays to listen.
What should the last sentence of a love letter be?
How can a family of five share one bathroom in peace?
Which small courtesies are dying out?
Would you rather be able to sing or to dance?
How do I answer when a child asks whether we're rich?
What's the most useful thing you can carry in a coat pocket?
Why does the house creak at night?
Give me three names for a grumpy goat.
What is the right way to lose an argument?
How would you greet a visitor from another planet at the bus stop?
What's the difference between saving and hoarding?
I only have carrots, rice and half a lemon.
Should a teacher be a friend?
How do you explain a joke in another language?
What are the duties of a best man?
What would a perfect Sunday lunch look like?
Why do we cry when we're happy?
How do you keep a balcony pleasant in winter?
What's a fair way to share inheritance among four siblings?
My umbrella turned inside out in front of the whole school.
How would you describe home in three objects?
What do you do when someone keeps finishing your sentences?
Which noise from the street do you like best?
Is it important to have a favourite colour?
How do I get a stubborn donkey through a gate?
What might people in the future find odd about us?
Where should one go to think?
What would you tell a friend who is about to become a father?
Does every family need a story it tells at every party?
How do you begin again after a failure?
What's the appeal of jigsaw puzzles?
What can I do with a rainy Sunday and a box of cardboard?
Why do we trust people in uniforms?
My teacher used to say that every mistake is a free lesson.
How do you make a cheap meal feel like a feast?
What's a reasonable bedtime for an adult?
If you could move one thing in your town, what would it be?
How do people become neighbours and not just people next door?
What does an honest advertisement for your sofa say?
How much privacy does a teenager need?
What's the quietest place you can imagine?
Why do we count sheep?
"""


def lines(block: str) -> list[str]:
    """Return the stripped, non-empty lines of a block of text."""
    return [line.strip() for line in block.splitlines() if line.strip()]


def head(sentence: str) -> str:
    """Return the sentence with a capital first letter."""
    return sentence[0].upper() + sentence[1:]


def words(sentence: str) -> list[str]:
    """Return the lower-case words of a sentence."""
    return re.findall(r"[a-z0-9']+", sentence.lower())


def composed(situations: Iterable[str], frames: tuple[str, ...], offset: int) -> Iterator[str]:
    """Yield every situation in one frame of each line, taking the frames of a line in turn."""
    for number, situation in enumerate(situations):
        for row, line in enumerate(frames):
            variants = [variant.strip() for variant in line.split(" | ")]
            frame = variants[(number + row + offset) % len(variants)]
            for slot, words_in_it in (("{v}", situation), ("{s}", situation), ("{S}", head(situation))):
                frame = frame.replace(slot, words_in_it)
            yield head(frame)


def distinct(prompts: Iterable[str]) -> Iterator[str]:
    """Yield the prompts whose bag of words has not been seen: order, case and signs make no new prompt."""
    seen: set[tuple[str, ...]] = set()
    for prompt in prompts:
        key = tuple(sorted(words(prompt)))
        if key not in seen:
            seen.add(key)
            yield prompt


def everyday() -> list[str]:
    """Return the everyday prompts in their shuffled order."""
    prompts = lines(ONE_OFFS)
    for offset, category in enumerate(CATEGORIES):
        prompts += composed(lines(category.tasks), category.task_frames, offset)
        prompts += composed(lines(category.events), category.event_frames, offset)
    kept = list(distinct(prompts))
    random.Random("everyday prompts").shuffle(kept)
    return kept


GENRES = (
    Genre(  # support thread
        "Export button | Password reset mail | Sidebar menu | Photo upload | Search field | Calendar sync | Dark mode switch"
        " | Invoice preview",
        "does nothing after update | disappears on small screens | freezes every second time | works only in one browser"
        " | shows an empty grey box",
        "Cannot sign in since this morning | Two accounts merged by accident | Where did my drafts go?"
        " | Undo stopped working overnight",
    ),
    Genre(  # changelog
        "Version 4.2 | The spring release | This patch | Build 1187 | The beta channel | Our long-term branch",
        "fixes three crashes | renames settings | drops an old format | speeds up the first start | adds new shortcuts",
        "Removed the deprecated import path | Known issues in this build | Thanks to all contributors"
        " | Upgrade notes for administrators",
    ),
    Genre(  # readme
        "A small library | Command line tool | A plain text parser | Tiny web server | A drawing program | Test runner",
        "for counting birds | written over one weekend | without any dependencies | that reads old tapes | for tidy people",
        "Install it with one command | Contributions are welcome, please read | Why another date library?"
        " | The format in one example",
    ),
    Genre(  # recipe
        "Barley soup | Plum dumplings | Baked fennel | Lentil pie | Sour cherry cake | Pickled beetroot | Onion tart"
        " | Chestnut stew",
        "for a cold evening | with brown butter | from my aunt's notebook | in under an hour | the way millers made it",
        "Soak the beans the night before | Serves six as a main | Peel the quinces while warm | Roll the dough thin and",
    ),
    Genre(  # local news
        "The council | A retired baker | The fire brigade | Our swimming club | The parish office | A class of nine",
        "has bought the old mill | was honoured on Thursday | is looking for helpers | opened its doors again"
        " | saved a trapped calf",
        "Road closed until further notice | Market moves to the station | New benches along the canal"
        " | Bridge repairs take longer than planned",
    ),
    Genre(  # weather report
        "Light rain | Morning fog | A warm front | Dry easterly wind | Scattered sleet | High pressure",
        "reaches the coast by noon | will linger in the valleys | moves north on Tuesday | gives way to sun"
        " | keeps gardeners waiting",
        "Temperatures fall slightly overnight | The outlook for the weekend | Frost possible above 600 metres",
    ),
    Genre(  # obituary
        "Edith Marlow, seamstress, | Tomas Verhoeven, ferryman, | Ruth Adeyemi, teacher, | Jonas Lindqvist, organ builder,"
        " | Maria Castellanos, botanist, | Harold Finch, grocer,",
        "died at home | is remembered by pupils | leaves four sons | taught us patience | never owned a car",
        "She was born above the bakery | The funeral will take place | In place of flowers, please",
    ),
    Genre(  # minutes of a meeting
        "The treasurer | Chairwoman Olsen | The roof committee | A newer member | The secretary",
        "reported a small surplus | asked for more time | presented two offers | withdrew the motion | read the last minutes",
        "Item four was postponed | Present were eleven members | The meeting closed at nine | Any other business: the kettle",
    ),
    Genre(  # field notes
        "A pair of curlews | The marked beetle | One young heron | A lone hare | The ringed gull | A late swallow",
        "was seen at dawn | shows no change | moved twelve metres | returned after the storm | stayed out of sight",
        "Wind from the west, light | No tracks in fresh snow | Third visit to the ditch",
    ),
    Genre(  # lab protocol
        "Sample B | The buffer solution | The third solution | The second culture | The control mixture | The filtered water",
        "was cooled to four degrees | is kept in the dark | was weighed twice | must be labelled first"
        " | was stirred for ten minutes",
        "Rinse the pipette before use | Deviation from the written method | Record the time and the",
    ),
    Genre(  # abstract of a paper
        "We study soil crusts | We measured bus delays | This survey of hedgerows | Our model of queues"
        " | Archived tide tables | A note on alloys",
        "in three coastal towns | over eleven years | with a simple method | as a first step | from a new angle",
        "Little is known about snail migration | The results suggest a weak link | Data were collected by volunteers",
    ),
    Genre(  # encyclopedia entry
        "The Ostrava Gate | The reed warbler | Lake Sennevik | The two-handed saw | Port Alder | The linden beetle"
        " | The Brindle Canal",
        "is a landmark in | was first described in | takes its name from | belongs to a family | covers roughly a tenth",
        "Salt roads of the northern plain | Its exact origin is disputed | Not to be confused with | In heraldry, the wheel",
    ),
    Genre(  # legal notice
        "The tenant | Either party | The buyer | A licensed carrier | The undersigned | Every member",
        "shall give written notice | may appeal within ten days | is liable for damage | agrees to the terms"
        " | must keep a copy",
        "Nothing in this clause limits | The term begins on signature | For the purposes of section four",
    ),
    Genre(  # manual
        "The red lamp | The drum lid | The feed roller | Your new kettle | The safety latch | The side panel",
        "must be checked before use | can be replaced by hand | is described in chapter two | should be cleaned weekly"
        " | is on the back",
        "Do not immerse in water | Remove all packing material first | Turn the dial until it | Spare parts and how to order",
    ),
    Genre(  # travel journal
        "The night ferry | Our guide Paolo | The monastery road | Every house there | The only café | A boy with a donkey",
        "was later than promised | smelled of oranges | surprised us again | made us forget the heat | led us uphill",
        "We reached the pass at noon | Day nine, still no map | Nobody had warned us about",
    ),
    Genre(  # product review
        "This garden hose | The folding chair | My third umbrella | This alarm clock | The cheap version | The wool blanket",
        "does what it should | broke after one season | is heavier than expected | surprised my whole family"
        " | came without instructions",
        "Three stars, and here is why | Bought it for my mother | Would I order it again?",
    ),
    Genre(  # forum question
        "Question about leaking gutters | Help with stubborn zips | Ideas for our hallway | Looking for quiet fans"
        " | Advice on second-hand skis | Trouble with old locks",
        "without much money | before the weekend | in a rented flat | on a budget",
        "Has anyone tried clay plaster? | Which hedge grows without fuss? | Solved: it was the fuse | Am I the only one who",
    ),
    Genre(  # letter to the editor
        "Your article on parking | Last week's cartoon | The new timetable | Mr Havel's letter | The fountain debate",
        "left out one fact | made me laugh aloud | deserves a reply | reminds me of 1987 | misses the real question",
        "Sir, I have walked that path | As a cyclist of forty years | May I suggest a quieter bell",
    ),
    Genre(  # private letter
        "Your parcel | The twins' photograph | Your long letter | The seed packet | News of your exam",
        "came on Friday morning | made my whole week | is on my desk | reached us at breakfast",
        "Dear Agnes, the garden has | It was good to hear from | Forgive this hurried note, but | You asked about the dog",
    ),
    Genre(  # diary
        "The first warm evening | A slow Tuesday | My last day | The walk to school | Breakfast with Nora | The train home",
        "and nothing to report | went better than expected | left me thoughtful | with rain at the end",
        "Woke before the bells today | Must remember to ask Father | Too tired to write much | I have decided to keep",
    ),
    Genre(  # short story opening
        "The locksmith | Old Benedikt | The boatman's girl | The lighthouse cook | The second twin | Nobody's uncle",
        "had never seen snow | kept the key anyway | counted the steps again | arrived without a hat | did not answer at once",
        "There were three clocks in the | On the day the river turned | The letter lay unopened on"
        " | It began with a borrowed spade",
    ),
    Genre(  # fairy tale
        "A miller's youngest daughter | The marsh king | A grey goose | The threadless tailor | Three brothers"
        " | The giant's cook",
        "lived beyond seven hills | set out one morning | found a silver comb | could not sleep | asked for a wooden bowl",
        "Long ago, when stones were soft | In a country without doors | Far below the frozen lake",
    ),
    Genre(  # poem
        "The ferry lamp | November | My mother's thimble | A field of oats | The blue door | Salt",
        "in the first light | before the rain | and the sound of | keeps its own hours",
        "O patient gate, you | What the orchard said at night | Between two bells, a swallow",
    ),
    Genre(  # play script
        "INNKEEPER, wiping glasses: | CLARA, from upstairs: | THE POSTMAN, breathless: | SECOND SAILOR, quietly:"
        " | AUNT ROSE, knitting: | A VOICE OUTSIDE:",
        "You are late again | That coat is mine | Where is the lamp? | I was told otherwise",
        "Scene two, a railway waiting room | Enter two gardeners with a ladder | The curtain rises on a kitchen",
    ),
    Genre(  # interview
        "The glassblower | Our oldest member | The stage designer | A night nurse | The chess coach | The bridge engineer",
        "on learning slowly | talks about her hands | remembers the first day | answers ten questions | on work and weather",
        "You grew up on a barge | What did your teacher say? | We met in her workshop",
    ),
    Genre(  # lecture notes
        "Week five, sediment | Second lecture, trade winds | Introduction to maps | Review of set theory"
        " | Part three, Roman roads | Seminar on short vowels",
        "with two examples | in broad outline | and open questions | , continued from Monday",
        "Recall from last time that | Definition of a closed curve | Not on the exam, but",
    ),
    Genre(  # textbook exercise
        "A rectangular pool | A round tank | A glass jar | The larger vessel",
        "is half full | stands on level ground | is shown in figure two | loses a tenth daily",
        "Prove that the two angles | Find the missing side length | Translate the following sentences"
        " | Label the parts of the | A train leaves at 7:40 with | A farmer has eighty hens and"
        " | A ladder leans against a wall | Two gears turn in opposite directions | Write the fractions in order of"
        " | Six friends share nine loaves of | Draw a triangle whose longest side",
    ),
    Genre(  # history
        "The canal strike | The guild of dyers | The winter of 1709 | The first printed map | The salt tax | Upper Hallein",
        "changed trade in the region | lasted eleven weeks | is poorly documented | divided the citizens"
        " | ended with a bargain",
        "Before the railway reached the coast | Of the seven gates, only two | Contemporary accounts disagree on"
        " | How the plough moved north",
    ),
    Genre(  # museum label
        "Bronze lamp | Painted chest | Child's leather shoe | Broken loom weight | Brass compass | Wooden toy horse",
        "found near the harbour | , probably eighteenth century | , gift of a collector | restored in 1962 | , maker unknown",
        "Oil on oak, unsigned | Please touch this stone | The owner's initials can be",
    ),
    Genre(  # sports report
        "The visitors | Goalkeeper Amsel | The under-fifteens | Our rowing eight | The home side | Substitute Kraller",
        "took an early lead | ran out of breath | settled for a draw | trained in the rain | made the difference",
        "A quiet first half in | Final standings after nine rounds | Record crowd at the velodrome",
    ),
    Genre(  # business report
        "Second-quarter turnover | The packaging division | Demand for tiles | The Rotterdam branch"
        " | Staff turnover | Freight cost",
        "rose by four percent | remained stable | was below the forecast | is reviewed in part two",
        "To our shareholders: the past year | Inventory was counted in March | Key figures at a glance",
    ),
    Genre(  # memo
        "The north car park | The third-floor kitchen | The mail room | The bicycle cellar | The delivery entrance",
        "will be closed on Monday | has a new rule | is out of order | has new opening hours | needs a volunteer",
        "To all staff, regarding chairs | Please label your lunch boxes | Reminder: fire drill at ten",
    ),
    Genre(  # job advert
        "Part-time gardener | Junior bookkeeper | Experienced sailmaker | Night porter | School cook | Piano tuner",
        "wanted from September | for a small workshop | in the old town | with own tools | for a friendly team",
        "You like early mornings and | What we offer: fair pay | Send your application to the",
    ),
    Genre(  # classified advert
        "Oak table | Child's bicycle | Two beehives | Accordion with case | Box of slide films | Cast iron stove"
        " | Pair of snowshoes",
        "for sale, hardly used | to give away | wanted by collector | must go before May | in exchange for firewood",
        "Lost: one grey glove near | Room to let, quiet house | Will swap lessons for",
    ),
    Genre(  # gardening column
        "The currant bush | A south wall | Your compost heap | The late tulip | Clay soil | The pear tree",
        "needs little attention now | rewards the patient | should be covered in autumn | can wait until March"
        " | suffers from wet feet",
        "Jobs for the first week of | Sow broad beans while it | Slugs, and what to plant",
    ),
    Genre(  # health leaflet
        "A sprained ankle | Hay fever | The flu vaccine | A good night's rest | Your first eye test | Iron in your diet",
        "explained in plain words | and daily life | at any age | , what to expect | in brief",
        "Bring your glasses and a list | How to use your inhaler | After the cast comes off",
    ),
    Genre(  # school essay
        "My grandfather's workshop | A river I know | My first bicycle | Our class hamster | Winter in my street",
        "and why it matters | in my own words | taught me something | , a short essay",
        "Should homework be done at school? | If I were mayor for a | Our trip to the planetarium",
    ),
    Genre(  # speech
        "Dear guests, | Members of the choir, | Ladies and gentlemen, | Dear friends, | Dear parents,",
        "tonight we mark a beginning | please take your seats | I will be brief | forty years have passed",
        "When I was asked to speak | Let us thank the kitchen | It is an honour to open",
    ),
    Genre(  # religious and civic calendar
        "The lantern procession | The harvest supper | Choir practice | The winter bazaar | The blessing of boats"
        " | The morning service",
        "starts at the chapel | has been moved indoors | takes place on Saturday | is open to all | needs two more tables",
        "Dates for the coming month | Candles can be collected from | Please bring your own cup",
    ),
    Genre(  # transcript
        "Caller from line two: | Radio host, laughing: | Captain to tower: | Speaker in the back: | The interpreter, pausing:",
        "could you repeat that | we lost the picture | that was my question | one moment, please",
        "Recording starts, tape eleven | [door closes, chairs move] | Beginning of the second session",
    ),
    Genre(  # log file
        "Worker 7 | Nightly backup | Sensor on the roof | Door controller | Mail queue | Session 0x3f",
        "started at 02:14 | waiting for reply | finished with two warnings | restarted by operator | reports low voltage",
        "INFO connection accepted from | WARN disk almost full on | 03:00:01 heartbeat received from",
    ),
    Genre(  # code comment
        "# This loop | // The cache | # The date parser | // A helper that | # The config file",
        "skips empty rows | must not be shared | runs once per day | assumes sorted input | is read only once",
        "def rotate(points, angle): returns | TODO: remove when the old | /* see the note on rounding",
    ),
    Genre(  # mailing list
        "Proposal: new mascot | Draft agenda for April | Vote on the room | Question about data formats"
        " | Summary of the last call",
        "with open points | , comments by Friday | , second attempt | , now with attachments",
        "Re: who has the keys? | I agree with Marta, but | Sorry for the late reply",
    ),
    Genre(  # book review
        "This slim novel | Her third collection | The new translation | A dockside memoir | The picture book"
        " | His study of hedges",
        "begins with a funeral | asks a simple question | is a patient book | loses its way | rewards slow reading",
        "Six hundred pages about cheese | Readers of her earlier work | Nothing happens, and beautifully",
    ),
    Genre(  # film and music review
        "The string quartet | A silent comedy | The debut album | The second act | The radio play | A film about ferries",
        "takes its time | ends on a question | was worth the drive | needs a larger stage | sounds better live",
        "The lights went down late | Eleven songs, no drums | An evening at the small hall",
    ),
    Genre(  # house listing
        "Bright corner flat | Stone cottage | Former bakery | Ground-floor studio | Terraced house | Converted barn",
        "near the botanical garden | with a tiled stove | in need of repair | on a quiet lane | with views of the river",
        "Two rooms and a deep cellar | Viewing by appointment on | The roof was renewed in",
    ),
    Genre(  # how-to
        "How to sharpen a scythe | How to splice rope | How to frame a print | How to bind a notebook"
        " | How to wax a table | How to read a barometer",
        "in five steps | without special tools | the slow way | for left-handed people",
        "You will need a sharp knife | First, measure the width of | Let the glue dry for",
    ),
    Genre(  # science news
        "A moss from Iceland | The oldest known flute | A forgotten comet | One species of bat"
        " | The deepest cave | An underwater volcano",
        "puzzles researchers | has been mapped | may explain the pattern | is studied again | turns out larger",
        "Telescopes will turn to the | Why crows remember faces | Ice cores tell of dry",
    ),
    Genre(  # customer mail
        "My recent order | The wrong lampshade | A missing screw | Invoice 20418 | The second delivery | My ticket refund",
        "and a small request | arrived on Wednesday | has not been answered | can be resolved quickly",
        "Dear customer service, I bought | Thank you for your patience with | Please cancel the subscription for",
    ),
    Genre(  # timetable and directions
        "Bus 14 | The slow train | The mountain lift | The harbour ferry | Tram line C",
        "runs every twenty minutes | leaves from platform two | stops at the hospital | ends here in winter",
        "Turn left after the chapel | From the station, follow the | Last departure on Sundays and",
    ),
    Genre(  # quiz and puzzle
        "Seven across | Riddle of the week | Round three, rivers | The travel puzzle | Question twelve",
        "with a hint below | for sharp eyes | and last week's answer | in two words",
        "Which capital lies furthest north? | Three sailors share one boat | Spot the odd one out | Solve it without a pencil",
    ),
    Genre(  # glossary
        "Ballast | Isobar | Crop rotation | Counterpoint | Tare weight | Dovetail joint",
        ", in everyday language | , see also the table | , a term used in | , from the Latin for",
        "Terms used in this handbook | Abbreviations are listed at the | Units and their symbols",
    ),
    Genre(  # ship and expedition log
        "The long boat | Our second sledge | The iron stove | The lower hatch | The spare mast",
        "gave us trouble today | held through the night | needs looking after | could not be repaired",
        "Position uncertain, sky overcast | Forty days out of harbour | Ice to starboard, moving slowly",
    ),
    Genre(  # podcast notes
        "Episode 31 | This week's guest | Our listener mail | The season finale | A bonus episode",
        "is all about bridges | starts with an apology | answers your questions | was recorded in a barn",
        "Links from the show are | In this conversation we cover | Support us by telling a",
    ),
    Genre(  # fact sheet
        "The common swift | Rye | The Danube sturgeon | Beeswax | Sea buckthorn | The alpine ibex",
        "at a glance | and its habitat | through the year | in numbers | as a raw material",
        "Average height and weight of | Five things about tidal power | Sources and further reading on",
    ),
)


def document_prefixes() -> list[str]:
    """Return the document openers in their shuffled order; each subject takes four of its genre's endings."""
    openers: list[str] = []
    for genre in GENRES:
        endings = [ending.strip() for ending in genre.endings.split(" | ")]
        openers += [opener.strip() for opener in genre.whole.split(" | ")]
        for number, subject in enumerate(genre.subjects.split(" | ")):
            taken = (endings[(number + turn) % len(endings)] for turn in range(4))
            openers += [f"{subject.strip()} {ending}".replace(" ,", ",").replace(",,", ",") for ending in taken]
    kept = [opener for opener in distinct(openers) if 3 <= len(opener.split()) <= 8]
    random.Random("document prefixes").shuffle(kept)
    return kept


FILES = {"everyday.txt": everyday, "document_prefixes.txt": document_prefixes}


def main() -> int:
    """Write the prompt files, or compare them with the committed ones."""
    parser = argparse.ArgumentParser(description="compose everyday.txt and document_prefixes.txt from their parts")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs from its parts")
    check = parser.parse_args().check
    stale = []
    for name, compose in FILES.items():
        path, prompts = PROMPTS / name, compose()
        text = "\n".join(prompts) + "\n"
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{name}: {len(prompts)} lines")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    for name in stale:
        print(f"{name} is not what its parts give\n\nhint: run `python scripts/make_prompts.py`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
