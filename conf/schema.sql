-- The lessons that can be joined: what lesson-server asks PostgreSQL for. Safe to run again at any time.
-- A platform with tables of its own needs none of this: it sets rds.lesson_query instead.

CREATE TABLE IF NOT EXISTS lessons (
    id         text PRIMARY KEY,               -- [A-Za-z0-9_-]{1,64}; clients name the lesson by it
    title      text NOT NULL DEFAULT '',       -- for people, the server never reads it
    seat_count integer,                        -- NULL or 0: a lesson without seats
    created_at timestamptz DEFAULT now()
);
