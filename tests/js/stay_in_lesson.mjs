// Runs the client of docs/clients/lesson_client.mjs, and prints each call of onJoined and of onRefused as one line of JSON.
// Usage: node stay_in_lesson.mjs COPY_OF_THE_CLIENT URL '{"client": …, "lesson_id": …}' TOKEN, until stdin is closed
const [path, url, who, token] = process.argv.slice(2);
const { stayInLesson } = await import(path);
const print = (line) => console.log(JSON.stringify(line));

Math.random = () => 0;  // no pause
stayInLesson(
  url,
  JSON.parse(who),
  async () => token,
  (socket) => print({ joined: socket.id }),
  (reason) => print({ refused: reason }),
);
process.stdin.on("end", () => process.exit()).resume();
