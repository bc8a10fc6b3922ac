// Asks a Layertap server what is inside its model: by Encode, and by EncodeStream in all kinds of frames.
// It also shows the details of a refused request.
//
// Usage: node dist/client.js [ADDRESS]
import * as grpc from "@grpc/grpc-js";

import { BadRequest, ErrorInfo, RetryInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";
import {
  DataType,
  EncodeRequest,
  EncodeResponse,
  EncodeResult,
  EncoderServiceClient,
  EncodeStreamRequest,
  EncodeStreamResponse,
  GetModelResponse,
  Input,
  OutputSelection,
  Tensor,
  Truncation,
} from "./gen/layertap/v1/encoder.js";

const options = {
  // The size of replies is limited by the server (Model.limits).
  "grpc.max_receive_message_length": -1,
  // A connection of its own for each client: otherwise those of one address share one.
  "grpc.use_local_subchannel_pool": 1,
};

// The server refuses at once what it cannot answer in this time.
const inTime = () => ({ deadline: Date.now() + 30_000 });

type Callback<Reply> = (error: grpc.ServiceError | null, reply: Reply) => void;

/** The reply of a unary call, as a promise. */
function replyOf<Reply>(call: (done: Callback<Reply>) => unknown): Promise<Reply> {
  return new Promise((resolve, reject) => {
    call((error, reply) => (error ? reject(error) : resolve(reply)));
  });
}

async function main(address: string): Promise<void> {
  const credentials = grpc.credentials.createInsecure();
  const first = new EncoderServiceClient(address, credentials, options);
  const described = await replyOf<GetModelResponse>((done) =>
    first.getModel({ model: "" }, new grpc.Metadata(), inTime(), done),
  );
  first.close();
  const model = described.model!;
  const { name, numLayers, numAttentionHeads } = model;
  const numConnections = Math.max(1, model.connections);
  console.log(`${name}: ${numLayers} layers, ${numAttentionHeads} heads, ${numConnections} connections`);

  // A server may have several processes, and a connection leads to one of them.
  const clients = Array.from({ length: Math.max(1, model.connections) }, () => {
    return new EncoderServiceClient(address, credentials, options);
  });
  let next = 0;
  const client = () => clients[next++ % clients.length];

  console.log("Encode:");
  await encode(client());
  console.log("EncodeStream:");
  await encodeStream(client());
  console.log("a refused request:");
  try {
    await replyOf<EncodeResponse>((done) => client().encode(refused(), new grpc.Metadata(), inTime(), done));
  } catch (error) {
    printStatus(statusOf(error));
  }
  clients.forEach((one) => one.close());
}

/** Asks for an embedding and for where the first token looks, in one call. */
async function encode(client: EncoderServiceClient): Promise<void> {
  const request = EncodeRequest.fromPartial({
    inputs: inputs("a text", "another text"),
    outputs: {
      tokens: true,
      embeddings: [{}], // as configured with the model
      attentions: { layers: [-1], meanOverHeads: true, queryPositions: [0] },
    },
  });
  const reply = await replyOf<EncodeResponse>((done) =>
    client.encode(request, new grpc.Metadata(), inTime(), done),
  );
  reply.results.forEach((result, i) => {
    printTensors(`${i}`, result);
    // The shape is (1, 1, 1, T): one layer, one mean of heads, one row.
    floats(result.attentions!).forEach((weight, column) => {
      console.log(`  ${i}: looks at ${result.tokens!.tokens[column]} with ${weight.toFixed(4)}`);
    });
  });
}

/** Sends some small requests, a large one and a refused one, and reads the answers meanwhile. */
async function encodeStream(client: EncoderServiceClient): Promise<void> {
  const requests = new Map<number, EncodeRequest>();
  for (let id = 1; id <= 8; id++) {
    requests.set(id, EncodeRequest.fromPartial({ inputs: inputs(`text ${id}`), outputs: { embeddings: [{}] } }));
  }
  requests.set(
    9,
    EncodeRequest.fromPartial({
      inputs: inputs("a text", "text ".repeat(250)),
      outputs: {
        hiddenStates: {}, // of all layers
        attentions: { layers: [0, -1] },
      },
      truncation: Truncation.TRUNCATION_END,
    }),
  );
  requests.set(10, refused());

  const stream = client.encodeStream(inTime());
  const answers = new Map<number, Answer>();
  for (const [requestId, request] of requests) {
    answers.set(requestId, new Answer());
    // write() returns false when a program with more to send should wait for "drain".
    stream.write(EncodeStreamRequest.fromPartial({ requestId, request, acceptsWhole: true, acceptsGrouped: true }));
  }
  stream.end();
  for await (const message of stream as AsyncIterable<EncodeStreamResponse>) {
    const frames = message.frame?.$case === "grouped" ? message.frame.value.frames : [message];
    for (const frame of frames) answers.get(frame.requestId)!.read(frame);
  }

  for (const [id, answer] of answers) {
    if (!answer.ended) throw new Error(`request ${id} has no answer`);
    if (answer.status?.code) {
      console.log(`  ${id}:`);
      printStatus(answer.status);
    } else {
      answer.results.forEach((result, i) => printTensors(`${id}.${i}`, result));
    }
  }
}

/** What has arrived for one request on a stream. */
class Answer {
  results: EncodeResult[] = [];
  status?: Status;
  ended = false;
  /** How many bytes of a tensor have arrived in chunks. */
  private received = new Map<Tensor, number>();

  read({ frame }: EncodeStreamResponse): void {
    switch (frame?.$case) {
      case "whole":
        this.results = frame.value.results;
        this.ended = true;
        break;
      case "header":
        this.results[frame.value.inputIndex] = frame.value.result!;
        break;
      case "chunk": {
        const { inputIndex, tensor: number, offset, data } = frame.value;
        const [, tensor] = tensors(this.results[inputIndex])[number];
        const received = this.received.get(tensor) ?? 0;
        if (received !== offset) throw new Error(`a chunk at ${offset}, after ${received} bytes`);
        if (offset === 0) tensor.data = new Uint8Array(sizeInBytes(tensor));
        tensor.data.set(data, offset);
        this.received.set(tensor, offset + data.length);
        break;
      }
      case "end":
        this.status = frame.value.status;
        this.ended = true;
        break;
      default:
        throw new Error("a frame of an unknown kind");
    }
  }
}

/** The tensors of a result in the order of its fields, which is how TensorChunk counts them. */
function tensors(result: EncodeResult): [string, Tensor][] {
  const all: [string, Tensor | undefined][] = [
    ["last_hidden_state", result.lastHiddenState],
    ["pooler_output", result.poolerOutput],
    ["hidden_states", result.hiddenStates],
    ["attentions", result.attentions],
    ...result.embeddings.map((one): [string, Tensor] => ["embedding", one]),
    ["logits", result.logits],
    ["logit_ids", result.logitIds],
    ["sparse_ids", result.sparseIds],
    ["sparse_weights", result.sparseWeights],
    ["contacts", result.contacts],
  ];
  return all.filter((one): one is [string, Tensor] => one[1] !== undefined);
}

function sizeInBytes(tensor: Tensor): number {
  if (tensor.dtype !== DataType.DATA_TYPE_FLOAT32) {
    throw new Error(`this program reads float32, not ${DataType[tensor.dtype]}`);
  }
  return tensor.shape.reduce((product, size) => product * size, 4);
}

/** The elements of a float32 tensor, row by row. */
function floats(tensor: Tensor): Float32Array {
  const { buffer, byteOffset } = tensor.data;
  const view = new DataView(buffer, byteOffset, sizeInBytes(tensor));
  return Float32Array.from({ length: view.byteLength / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

function printTensors(label: string, result: EncodeResult): void {
  for (const [name, tensor] of tensors(result)) {
    const values = floats(tensor);
    const [a, b, last] = [values[0], values[1], values[values.length - 1]].map((one) => one.toFixed(4));
    console.log(`  ${label}: ${name} [${tensor.shape.join(" ")}]: ${a} ${b} … ${last}`);
  }
}

/** The google.rpc.Status of a failed call; it has no details if the call never reached the server. */
function statusOf(error: unknown): Status {
  if (!(error instanceof Error && "metadata" in error)) throw error;
  const { code, details, metadata } = error as grpc.ServiceError;
  const [trailer] = metadata.get("grpc-status-details-bin");
  return trailer instanceof Buffer ? Status.decode(trailer) : { code, message: details, details: [] };
}

/** Prints an error with its details: what a program can act on. */
function printStatus(status: Status): void {
  console.log(`  ${grpc.status[status.code]}: ${status.message}`);
  for (const { typeUrl, value } of status.details) {
    switch (typeUrl.split("/").pop()) {
      case "google.rpc.ErrorInfo":
        console.log(`    reason ${ErrorInfo.decode(value).reason}`);
        break;
      case "google.rpc.BadRequest":
        for (const { field, description } of BadRequest.decode(value).fieldViolations) {
          console.log(`    field ${field}: ${description}`);
        }
        break;
      case "google.rpc.RetryInfo": {
        const { seconds, nanos } = RetryInfo.decode(value).retryDelay!;
        console.log(`    try again in ${(seconds + nanos / 1e9).toFixed(1)} s`);
        break;
      }
    }
  }
}

/** A request that no model can answer. */
function refused(): EncodeRequest {
  const outputs = OutputSelection.fromPartial({ lastHiddenState: true });
  return EncodeRequest.fromPartial({ inputs: inputs("a text"), outputs, maxTokens: 1_000_000 });
}

function inputs(...texts: string[]): Input[] {
  return texts.map((value) => ({ content: { $case: "text", value } }));
}

main(process.argv[2] ?? "127.0.0.1:50051").catch((error: unknown) => {
  console.log("failed:");
  printStatus(statusOf(error));
  process.exit(1);
});
