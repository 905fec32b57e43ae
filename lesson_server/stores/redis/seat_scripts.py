"""Redis: the Lua scripts on the seat map of a lesson, each one atomic step.

``KEYS`` are the seat map, its index and its freed seats, all in one slot of a cluster:

* the *index*, a hash: for each person who has, or has left, a seat: ``seat due``, where the seat is 0 after the person
  has left it, and ``due`` is the time after which the seat is freed if the person is not in the lesson, in milliseconds
  since 1970. The field with the empty name is ``mark searched``: see the freed seats, and when the whole map was
  last searched;
* the *freed seats*, a sorted set: the free seats up to the mark. Above the mark, the map itself is searched, and the
  mark is moved. So a free seat is found without reading the whole map.

``ARGV[1]`` is the channel of the lesson's room, ``ARGV[2]`` the lesson, ``ARGV[3]`` the TTL of the keys in seconds, and
``ARGV[4]`` the grace of a seat in milliseconds. A script publishes each change that it makes, so that every subscriber
gets each change once, in the order of the changes.
"""

# Seats that are missing are added: a lesson may have grown. A map is complete if it has as many fields as the lesson
# has seats, and the last seat: most joins of a class add nothing.
ENSURE = """
local function ensure(seat_count)
    local seats = redis.call('HLEN', KEYS[1])
    if seats >= seat_count and redis.call('HEXISTS', KEYS[1], seat_count) == 1 then return end
    if seats == 0 then
        redis.call('DEL', KEYS[2], KEYS[3])
        redis.call('HSET', KEYS[2], '', '0 0')
    end
    for seat = 1, seat_count do
        redis.call('HSETNX', KEYS[1], seat, '')
    end
end
"""

# ARGV: the number of seats, the TTL, the person or ''. Returns the person's seat, or 0.
ENSURE_SEAT_MAP = f"""{ENSURE}
ensure(tonumber(ARGV[1]))
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[2]) end
local value = ARGV[3] ~= '' and redis.call('HGET', KEYS[2], ARGV[3])
return value and tonumber(string.match(value, '^%d+')) or 0
"""

# Milliseconds between two searches of the whole map for a free seat that another program has made.
SEARCH_INTERVAL = 1000

SEATS = f"""
local map, index, freed = KEYS[1], KEYS[2], KEYS[3]
local call = redis.call
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function expire()
    for _, key in ipairs(KEYS) do call('EXPIRE', key, ARGV[3]) end
end

local function announce(seat, person)
    local text = string.format(
        '{{"method":"emit","event":"seat_changed","namespace":"/","room":"%s","data":[{{"seat":%d,"client_id":%s}}]}}',
        ARGV[2], seat, person and cjson.encode(person) or 'null'
    )
    local answer = redis.pcall('SPUBLISH', ARGV[1], text)
    if type(answer) == 'table' then  -- a Redis before 7
        call('PUBLISH', ARGV[1], text)
    end
end

local function keep(person, seat)
    call('HSET', index, person, string.format('%s %.0f', seat, now + ARGV[4]))
end

-- The index is missing if another program has made the map.
local function open_index()
    if call('HEXISTS', index, '') == 1 then return end
    call('HSET', index, '', '0 0')
    local seats = call('HGETALL', map)
    for position = 1, #seats, 2 do
        if seats[position + 1] ~= '' then keep(seats[position + 1], seats[position]) end
    end
    expire()
end

-- Returns the seat that the index has of a person: 0 if the person has left it, nil if the person never had one.
local function known_seat(person)
    local value = call('HGET', index, person)
    return value and string.match(value, '^%d+')
end

local function seat_of(person)
    local seat = known_seat(person)
    return seat and call('HGET', map, seat) == person and seat
end

local function read_mark()
    return string.match(call('HGET', index, '') or '0 0', '^(%d+) (%d+)$')
end

local function occupy(seat, person)
    call('HSET', map, seat, person)
    call('ZREM', freed, seat)
    announce(seat, person)
end

local function vacate(seat)
    call('HSET', map, seat, '')
    local mark = read_mark()
    if tonumber(seat) <= tonumber(mark) then call('ZADD', freed, seat, seat) end
    announce(seat, nil)
end

local function search(seat, searched)
    local occupant
    repeat
        seat = seat + 1
        occupant = call('HGET', map, seat)
    until not occupant or occupant == ''
    call('HSET', index, '', string.format('%d %.0f', occupant and seat or seat - 1, searched))
    return occupant and string.format('%d', seat)
end

local function lowest_free_seat()
    local seat = call('ZRANGE', freed, 0, 0)[1]
    while seat do
        if call('HGET', map, seat) == '' then return seat end
        call('ZREM', freed, seat)
        seat = call('ZRANGE', freed, 0, 0)[1]
    end
    local mark, searched = read_mark()
    seat = search(mark, searched)
    if not seat and now - searched >= {SEARCH_INTERVAL} then seat = search(0, now) end
    return seat
end
"""

# ARGV[5]: the person. ARGV[6]: the seat, or '' for any. ARGV[7]: the number of seats. Returns the outcome and the seat.
TAKE = f"""{ENSURE}{SEATS}
local person, wanted = ARGV[5], ARGV[6]
if ARGV[7] ~= '0' then ensure(tonumber(ARGV[7])) end
if call('EXISTS', map) == 0 then return {{'no_seats', 0}} end
open_index()
local held = seat_of(person)
local seat = wanted
if wanted == '' then
    seat = held or lowest_free_seat()
    if not seat then return {{'full', 0}} end
end
local occupant = call('HGET', map, seat)
if not occupant then return {{'no_such_seat', 0}} end
if occupant ~= '' and occupant ~= person then return {{'held_by_another', 0}} end
if held and held ~= seat then vacate(held) end
if occupant == '' then occupy(seat, person) end
keep(person, seat)
expire()
return {{held == seat and 'held' or 'taken', tonumber(seat)}}
"""

# ARGV[5]: the person. Returns the seat that was left, or 0.
LEAVE = f"""{SEATS}
open_index()
local seat = seat_of(ARGV[5])
if not seat then return 0 end
vacate(seat)
keep(ARGV[5], 0)
expire()
return tonumber(seat)
"""

# ARGV[5]: the person. ARGV[6]: the seat that the person had before Redis lost its data. Returns the person's seat, or 0
# if the person has left it, or if somebody else has it meanwhile.
RESTORE = f"""{SEATS}
open_index()
local person = ARGV[5]
local seat = known_seat(person) or ARGV[6]
local occupant = call('HGET', map, seat) or ''
if seat == '0' or (occupant ~= '' and occupant ~= person) then return 0 end
if occupant == '' then occupy(seat, person) end
keep(person, seat)
expire()
return tonumber(seat)
"""

# ARGV[5]: the person. ARGV[6]: what the index had of the person when the person was found absent. Returns the seat that
# was freed, or 0; -1 if the index has changed meanwhile.
FREE_IF_UNCHANGED = f"""{SEATS}
if call('HGET', index, ARGV[5]) ~= ARGV[6] then return -1 end
local seat = seat_of(ARGV[5])
call('HDEL', index, ARGV[5])
if not seat then return 0 end
vacate(seat)
expire()
return tonumber(seat)
"""

# ARGV[5]: the person. Returns the number of seats that were freed. The whole map is read, because a removed person is
# rare, and another program may have given the person a seat.
FREE = f"""{SEATS}
open_index()
local count = 0
local seats = call('HGETALL', map)
for position = 1, #seats, 2 do
    if seats[position + 1] == ARGV[5] then
        vacate(seats[position])
        count = count + 1
    end
end
call('HDEL', index, ARGV[5])
expire()
return count
"""

# KEYS: the index. ARGV: the person, the grace in milliseconds. Begins the grace of the person's seat; returns whether
# Redis knows the person.
DEPART = """
local value = redis.call('HGET', KEYS[1], ARGV[1])
if not value then return 0 end
local time = redis.call('TIME')
local due = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2]
redis.call('HSET', KEYS[1], ARGV[1], string.format('%s %.0f', string.match(value, '^%d+'), due))
return 1
"""

# KEYS: the index. ARGV: the person. Returns what the index has of the person, and the milliseconds until the seat is
# due; '' if Redis does not know the person.
READ_DUE = """
local value = redis.call('HGET', KEYS[1], ARGV[1])
if not value then return {'', 0} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return {value, tonumber(string.match(value, '%d+$')) - now}
"""
