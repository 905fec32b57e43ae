"""Redis: the Lua scripts for one entry of a record and the claims on it, each one atomic step.

After each script that writes the entry, *the entry shows its newest claim*. ``KEYS`` are the entry and its claims;
``ARGV[1]`` is a claim (JSON: its name, then the fields that the entry shows for it); ``ARGV[2]`` is the TTL in seconds.
"""

SHOW = """
local function show(claim)
    redis.call('HSET', KEYS[1], unpack(cjson.decode(claim), 2))
    redis.call('EXPIRE', KEYS[1], ARGV[2])
    redis.call('EXPIRE', KEYS[2], ARGV[2])
end
"""

# ARGV[3]: '1' if the entry outlives its claims. If such an entry shows an ended connection, its fields are kept as a
# claim of order 0, so that a failed join can be undone. Returns the order of the claim (higher than that of every other
# claim, even if the clock of Redis was set back), and whether another connection has or had the entry.
WRITE = f"""{SHOW}
local fields = cjson.decode(ARGV[1])
local newest = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
local order = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not order then
    if ARGV[3] == '1' and not newest[1] and redis.call('HEXISTS', KEYS[1], fields[2]) == 1 then
        local ended = {{''}}
        for position = 2, #fields, 2 do
            ended[position] = fields[position]
            ended[position + 1] = redis.call('HGET', KEYS[1], fields[position]) or ''
        end
        redis.call('ZADD', KEYS[2], 0, cjson.encode(ended))
    end
    local time = redis.call('TIME')
    order = string.format('%.0f', math.max(time[1] * 1000000 + time[2], (tonumber(newest[2]) or 0) + 1))
    redis.call('ZADD', KEYS[2], order, ARGV[1])
end
show(redis.call('ZREVRANGE', KEYS[2], 0, 0)[1])
local known = 0
if ARGV[3] == '1' then
    for _, claim in ipairs(redis.call('ZRANGE', KEYS[2], 0, 9)) do
        if cjson.decode(claim)[3] ~= fields[3] then known = 1 end
    end
end
return {{order, known}}
"""

# ARGV[3]: the order of the claim. ARGV[4], …: the claims of this connection that the claim replaces.
RESTORE = f"""{SHOW}
if #ARGV > 3 then
    redis.call('ZREM', KEYS[2], unpack(ARGV, 4))
end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
show(redis.call('ZREVRANGE', KEYS[2], 0, 0)[1])
"""

# ARGV[3]: the order of the claim. Returns whether the claim exists and the entry shows the newest claim; if so, renews
# each TTL that is below half of ARGV[2].
CHECK = """
local order = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not order then
    return 0
end
if order ~= ARGV[3] then
    redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
end
local newest = cjson.decode(redis.call('ZREVRANGE', KEYS[2], 0, 0)[1])
if redis.call('HGET', KEYS[1], newest[2]) ~= newest[3] then
    return 0
end
for _, key in ipairs(KEYS) do
    if redis.call('TTL', key) < ARGV[2] / 2 then
        redis.call('EXPIRE', key, ARGV[2])
    end
end
return 1
"""

# ARGV[3]: 'remove', or, for an entry that outlives its claims, 'keep' or 'undo'. 'keep' leaves the entry unchanged if
# no other claim is left. Otherwise it keeps the fields of the removed claim as the claim of order 0, because the joins
# of all other claims may still fail. 'undo' restores the entry to its state before the claim. A repeated 'undo' does
# nothing, because the connection may have joined again, and ended, since. Returns 1 if the entry's key is gone.
REMOVE = f"""{SHOW}
local removed = redis.call('ZREM', KEYS[2], ARGV[1])
if removed == 0 and ARGV[3] == 'undo' then
    return 0
end
local newest = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if newest[1] and tonumber(newest[2]) > 0 then
    if removed == 1 and ARGV[3] == 'keep' then
        local ended = cjson.decode(ARGV[1])
        ended[1] = ''
        redis.call('ZREMRANGEBYSCORE', KEYS[2], 0, 0)
        redis.call('ZADD', KEYS[2], 0, cjson.encode(ended))
    end
    show(newest[1])
    return 0
end
redis.call('DEL', KEYS[2])
if ARGV[3] == 'keep' then
    return 0
end
if newest[1] then
    show(newest[1])
    return 0
end
local fields = cjson.decode(ARGV[1])
if redis.call('HGET', KEYS[1], fields[2]) == fields[3] then
    for position = 2, #fields, 2 do
        redis.call('HDEL', KEYS[1], fields[position])
    end
end
return 1 - redis.call('EXISTS', KEYS[1])
"""
