// npm `openai`: responses in background, cut and taken up again, polled, cancelled. usage: background.mjs BASE_URL ASKED_JSON
import OpenAI from "openai";

const [baseURL, asked] = process.argv.slice(2);
const { query, body, slow } = JSON.parse(asked);
const client = new OpenAI({ baseURL: `${baseURL}/v1`, apiKey: "sk-test", maxRetries: 0, timeout: 20_000 });
const request = { model: "fake-model", input: "Tell me about rings.", background: true };
const found = {};

const events = [];
async function take(stream, count) {
  for await (const event of stream) {
    events.push(event);
    if (--count === 0) break;
  }
}
const ended = () => ["response.completed", "response.incomplete"].includes(events.at(-1).type);
const lastSeen = () => events.at(-1).sequence_number || events.length;

await take(await client.responses.create({ ...request, stream: true, ...body }, { query }), 4);
const id = events[0].response.id;
for (found.cuts = 0; !ended() && found.cuts < 40; found.cuts++) {
  await take(await client.responses.retrieve(id, { stream: true, starting_after: lastSeen() }), 7);
}
found.numbers = events.map((event) => event.sequence_number ?? null);
found.types = events.map((event) => event.type);
found.streamed = events
  .filter((event) => event.type === "response.output_text.delta")
  .map((event) => event.delta)
  .join("");
const textOf = (response) => response.output.flatMap((item) => item.content ?? []).map((part) => part.text).join("");
found.text = textOf(events.at(-1).response);
const retrieved = await client.responses.retrieve(id);
found.retrieved = { status: retrieved.status, text: retrieved.output_text };
const seen = events.length;
await take(await client.responses.retrieve(id, { stream: true, starting_after: lastSeen() }));
found.atEnd = events.length - seen;

let response = await client.responses.create({ ...request, ...body }, { query });
found.polled = [response.status];
while (["queued", "in_progress"].includes(response.status)) {
  await new Promise((resolve) => setTimeout(resolve, 50));
  response = await client.responses.retrieve(response.id);
  found.polled.push(response.status);
}

const stream = await client.responses.create({ ...request, stream: true, ...slow.body }, { query: slow.query });
try {
  for await (const event of stream) {
    if (event.type !== "response.created") continue;
    const { status } = await client.responses.cancel(event.response.id);
    const again = await client.responses.cancel(event.response.id);
    const now = await client.responses.retrieve(event.response.id);
    found.cancelled = [status, again.status, now.status];
  }
} catch (error) {
  found.told = { kind: error.constructor.name, code: error.code };
}
console.log(JSON.stringify(found));
