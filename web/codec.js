// Text into token ids, and conversations into text, by the `tokenizer.json` that the server hands out: the vocabulary, and
// under `sflllm` what the files beside it said (which token ends a text, the chat template, and so on).
//
// What is learned of a conversation is decided in the engine, which asks `render` for its text again and again.

import { Tokenizer } from './vendor/tokenizers/tokenizers.min.mjs';

const END_OF_TEXT = '<|endoftext|>';
// How long the work may keep a Worker from answering the server.
const SLICE_MILLISECONDS = 50;
const utf8 = new TextEncoder();

// `{% generation %}` marks answers and writes nothing: as an `if` that always holds it treats white space alike.
const withoutGenerationMarks = (template) =>
  template.replace(/({%[-+]?\s*)(end)?generation(?![\w])/g, (_, open, end) => open + (end ? 'endif' : 'if true'));

// Python's `strip` and its like take the letters to strip; the interpreter's strip white space whatever they are given. Calls
// with letters are made calls of this function.
const STRIP = 'strip_letters';
const SIDES = { strip: [true, true], lstrip: [true, false], rstrip: [false, true] };

function stripLetters(text, letters, name) {
  const [left, right] = SIDES[name];
  const all = [...text];
  let [from, to] = [0, all.length];
  while (left && from < to && letters.includes(all[from])) from += 1;
  while (right && to > from && letters.includes(all[to - 1])) to -= 1;
  return all.slice(from, to).join('');
}

function useStripLetters(node) {
  if (typeof node !== 'object' || node === null) return;
  for (const inner of Object.values(node)) useStripLetters(inner);
  const { callee, args } = node;
  if (node.type !== 'CallExpression' || callee.type !== 'MemberExpression' || callee.computed) return;
  if (Object.hasOwn(SIDES, callee.property.value) && args.length === 1) {
    node.args = [callee.object, args[0], { type: 'StringLiteral', value: callee.property.value }];
    node.callee = { type: 'Identifier', value: STRIP };
  }
}

// Whether a part of the tokenizer, or one inside of it, is of a type.
const uses = (part, type) =>
  part?.type === type || Object.values(part ?? {}).some((inner) => typeof inner === 'object' && uses(inner, type));

export class Codec {
  // `modelEnd` ends a text where no file names another token.
  constructor(bytes, modelEnd) {
    const json = JSON.parse(new TextDecoder().decode(bytes));
    const settings = json.sflllm ?? {};
    this.tokenizer = new Tokenizer(json, {});
    this.added = new Map((json.added_tokens ?? []).map((token) => [token.id, token.content]));
    this.byteLevel = uses(json.decoder, 'ByteLevel') && !uses(json.normalizer, 'Replace') && !uses(json.normalizer, 'Prepend');
    this.composes = uses(json.normalizer, 'NFC');
    this.end = settings.eos ?? this.tokenizer.token_to_id(END_OF_TEXT) ?? modelEnd;
    this.begin = settings.add_bos ? [settings.bos] : [];
    this.specialTokens = (json.added_tokens ?? []).filter((token) => token.special).map((token) => token.content);
    const end = this.token(this.end);
    if (end && !this.specialTokens.includes(end)) this.specialTokens.push(end);
    this.source = settings.chat_template ?? null;
    this.named = { bos_token: this.token(settings.bos), eos_token: end, ...settings.named_tokens };
  }

  token(id) {
    return id === undefined ? undefined : (this.added.get(id) ?? this.tokenizer.id_to_token(id));
  }

  // Gets the template ready. Gives back the function that runs it, or nothing where the model has none.
  async renderer() {
    if (this.source === null) return undefined;
    if (!this.byteLevel) throw new Error('conversations with this model need the native client (sflllm join): its tokenizer is not of bytes');
    const { Template } = await import('./vendor/jinja/jinja.mjs');
    const template = new Template(withoutGenerationMarks(this.source));
    useStripLetters(template.parsed);
    const named = Object.fromEntries(Object.entries(this.named).filter(([, token]) => token !== undefined));
    return (variables, addGenerationPrompt) => {
      const text = template.render({
        ...named,
        ...JSON.parse(variables),
        [STRIP]: stripLetters,
        documents: null,
        add_generation_prompt: addGenerationPrompt,
      });
      // The tokenizer would do it, and then its tokens would not be those of the text's bytes.
      return this.composes ? text.normalize('NFC') : text;
    };
  }

  encode(text) {
    return this.tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  // Ids of a conversation's text, and the byte of it at which each of them ends: every letter of a token stands for a byte.
  encodeWithEnds(text) {
    const ids = this.encode(text);
    let at = 0;
    const ends = ids.map((id) => {
      const added = this.added.get(id);
      at += added === undefined ? this.tokenizer.id_to_token(id).length : utf8.encode(added).length;
      return at;
    });
    if (at !== utf8.encode(text).length) throw new Error('the tokens of a conversation do not fit its text; use the native client (sflllm join)');
    return { ids, ends };
  }
}

// Makes the examples of a file whose reader (`DataReader`) has parsed it. `progress(done, total)` is called now and then,
// between which others may work; what it throws ends it all.
export async function readExamples(reader, tokenizerFile, modelEnd, progress) {
  const conversations = reader.conversations();
  let from = performance.now();
  const breathe = async (done, total) => {
    if (performance.now() - from <= SLICE_MILLISECONDS) return;
    progress(done, total);
    await new Promise((resolve) => setTimeout(resolve));
    from = performance.now();
  };
  if (conversations === 0 && reader.texts().length === 0) {
    reader.assemble(new Uint32Array(), new Uint32Array(), new Uint32Array(), undefined);
    return;
  }
  if (!tokenizerFile) throw new Error('the server has no tokenizer.json; only files of token ids can be used');
  const codec = new Codec(tokenizerFile, modelEnd);
  if (conversations > 0) {
    const render = await codec.renderer();
    for (let done = 0; reader.renderNext(render, codec.specialTokens); done += 1) await breathe(done, conversations);
  }
  const texts = reader.texts();
  const transcripts = reader.transcripts();
  const total = texts.length + transcripts.length;
  const parts = [];
  const lengths = new Uint32Array(texts.length);
  for (const [index, text] of texts.entries()) {
    parts.push(codec.encode(text));
    lengths[index] = parts[index].length;
    await breathe(index, total);
  }
  for (const [index, text] of transcripts.entries()) {
    const { ids, ends } = codec.encodeWithEnds(text);
    reader.takeTranscript(new Uint32Array(ids), new Uint32Array(ends));
    await breathe(texts.length + index, total);
  }
  const flat = new Uint32Array(lengths.reduce((sum, length) => sum + length, 0));
  let at = 0;
  for (const ids of parts) {
    flat.set(ids, at);
    at += ids.length;
  }
  reader.assemble(flat, lengths, new Uint32Array(codec.begin), codec.end);
}
