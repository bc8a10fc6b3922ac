package layertap.example;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.StreamObserver;
import java.io.PrintStream;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.function.Supplier;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import layertap.v1.AttentionSelection;
import layertap.v1.DataType;
import layertap.v1.EmbeddingSpec;
import layertap.v1.EncodeRequest;
import layertap.v1.EncodeResponse;
import layertap.v1.EncodeResult;
import layertap.v1.EncodeStreamRequest;
import layertap.v1.EncodeStreamResponse;
import layertap.v1.EncoderServiceGrpc;
import layertap.v1.GetModelRequest;
import layertap.v1.HiddenStateSelection;
import layertap.v1.Input;
import layertap.v1.Model;
import layertap.v1.OutputSelection;
import layertap.v1.Tensor;
import layertap.v1.TensorChunk;
import layertap.v1.Truncation;

/**
 * Asks a Layertap server what is inside its model: by Encode, and by EncodeStream in all kinds of
 * frames. It also shows the details of a refused request.
 *
 * <p>Arguments: the server's address, by default 127.0.0.1:50051.
 */
public final class Client {
  /** Of each call. The server refuses at once what it cannot answer in this time. */
  private static final long TIMEOUT_S = 30;

  private static final PrintStream OUT = new PrintStream(System.out, true, StandardCharsets.UTF_8);

  public static void main(String[] arguments) {
    try {
      run(arguments.length > 0 ? arguments[0] : "127.0.0.1:50051");
    } catch (StatusRuntimeException error) {
      OUT.println("failed:");
      printStatus(StatusProto.fromThrowable(error));
      System.exit(1);
    }
  }

  private static void run(String address) {
    Model model = describe(address);
    print(
        "%s: %d layers, %d heads, %d connections",
        model.getName(),
        model.getNumLayers(),
        model.getNumAttentionHeads(),
        Math.max(1, model.getConnections()));

    // A server may have several processes, and a connection leads to one of them.
    List<ManagedChannel> channels = new ArrayList<>();
    for (int i = 0; i < Math.max(1, model.getConnections()); i++) {
      channels.add(open(address));
    }
    AtomicInteger next = new AtomicInteger();
    Supplier<ManagedChannel> channel =
        () -> channels.get(Math.floorMod(next.getAndIncrement(), channels.size()));
    try {
      OUT.println("Encode:");
      encode(channel.get());
      OUT.println("EncodeStream:");
      encodeStream(channel.get());
      OUT.println("a refused request:");
      try {
        blocking(channel.get()).encode(refused());
      } catch (StatusRuntimeException error) {
        printStatus(StatusProto.fromThrowable(error));
      }
    } finally {
      channels.forEach(ManagedChannel::shutdownNow);
    }
  }

  private static ManagedChannel open(String address) {
    return ManagedChannelBuilder.forTarget(address)
        .usePlaintext()
        // The size of replies is limited by the server (Model.limits).
        .maxInboundMessageSize(Integer.MAX_VALUE)
        .build();
  }

  private static EncoderServiceGrpc.EncoderServiceBlockingStub blocking(ManagedChannel channel) {
    return EncoderServiceGrpc.newBlockingStub(channel).withDeadlineAfter(TIMEOUT_S, TimeUnit.SECONDS);
  }

  private static Model describe(String address) {
    ManagedChannel channel = open(address);
    try {
      return blocking(channel).getModel(GetModelRequest.getDefaultInstance()).getModel();
    } finally {
      channel.shutdownNow();
    }
  }

  /** Asks for an embedding and for where the first token looks, in one call. */
  private static void encode(ManagedChannel channel) {
    OutputSelection outputs =
        OutputSelection.newBuilder()
            .setTokens(true)
            .addEmbeddings(EmbeddingSpec.getDefaultInstance()) // as configured with the model
            .setAttentions(
                AttentionSelection.newBuilder()
                    .addLayers(-1)
                    .setMeanOverHeads(true)
                    .addQueryPositions(0))
            .build();
    EncodeResponse reply = blocking(channel).encode(request(outputs, "a text", "another text"));
    for (int i = 0; i < reply.getResultsCount(); i++) {
      EncodeResult result = reply.getResults(i);
      printTensors(String.valueOf(i), named(result));
      // The shape is (1, 1, 1, T): one layer, one mean of heads, one row.
      FloatBuffer weights = floats(result.getAttentions().getData());
      for (int column = 0; column < weights.limit(); column++) {
        print("  %d: looks at %s with %.4f", i, result.getTokens().getTokens(column), weights.get(column));
      }
    }
  }

  /** Sends some small requests, a large one and a refused one, and reads the answers meanwhile. */
  private static void encodeStream(ManagedChannel channel) {
    Map<Long, EncodeRequest> requests = new TreeMap<>();
    OutputSelection small =
        OutputSelection.newBuilder().addEmbeddings(EmbeddingSpec.getDefaultInstance()).build();
    for (long id = 1; id <= 8; id++) {
      requests.put(id, request(small, "text " + id));
    }
    OutputSelection large =
        OutputSelection.newBuilder()
            .setHiddenStates(HiddenStateSelection.getDefaultInstance()) // of all layers
            .setAttentions(AttentionSelection.newBuilder().addLayers(0).addLayers(-1))
            .build();
    requests.put(
        9L,
        request(large, "a text", "text ".repeat(250)).toBuilder()
            .setTruncation(Truncation.TRUNCATION_END)
            .build());
    requests.put(10L, refused());

    Map<Long, Answer> answers = new TreeMap<>();
    requests.keySet().forEach(id -> answers.put(id, new Answer()));
    CompletableFuture<Void> over = new CompletableFuture<>();
    StreamObserver<EncodeStreamRequest> sender =
        EncoderServiceGrpc.newStub(channel)
            .withDeadlineAfter(TIMEOUT_S, TimeUnit.SECONDS)
            .encodeStream(
                new StreamObserver<>() {
                  @Override
                  public void onNext(EncodeStreamResponse message) {
                    List<EncodeStreamResponse> frames =
                        message.hasGrouped()
                            ? message.getGrouped().getFramesList()
                            : List.of(message);
                    for (EncodeStreamResponse frame : frames) {
                      answers.get(frame.getRequestId()).read(frame);
                    }
                  }

                  @Override
                  public void onError(Throwable error) {
                    over.completeExceptionally(error);
                  }

                  @Override
                  public void onCompleted() {
                    over.complete(null);
                  }
                });
    requests.forEach(
        (id, request) ->
            sender.onNext(
                EncodeStreamRequest.newBuilder()
                    .setRequestId(id)
                    .setRequest(request)
                    .setAcceptsWhole(true)
                    .setAcceptsGrouped(true)
                    .build()));
    sender.onCompleted();
    try {
      over.join();
    } catch (CompletionException error) {
      throw Status.fromThrowable(error.getCause()).asRuntimeException(Status.trailersFromThrowable(error));
    }

    answers.forEach(
        (id, answer) -> {
          if (!answer.ended) {
            throw new IllegalStateException("request " + id + " has no answer");
          }
          if (answer.status.getCode() != 0) {
            print("  %d:", id);
            printStatus(answer.status);
          }
          for (int i = 0; i < answer.results.size(); i++) {
            printTensors(id + "." + i, answer.results.get(i));
          }
        });
  }

  /** A tensor of a result; its data is that of the message, or put together from chunks. */
  private static final class NamedTensor {
    final String name;
    final Tensor tensor;
    ByteString data;

    NamedTensor(String name, Tensor tensor) {
      this.name = name;
      this.tensor = tensor;
      this.data = tensor.getData();
    }
  }

  /** What has arrived for one request on a stream. */
  private static final class Answer {
    List<List<NamedTensor>> results = new ArrayList<>();
    com.google.rpc.Status status = com.google.rpc.Status.getDefaultInstance();
    boolean ended;

    void read(EncodeStreamResponse frame) {
      switch (frame.getFrameCase()) {
        case WHOLE -> {
          frame.getWhole().getResultsList().forEach(result -> results.add(named(result)));
          ended = true;
        }
        case HEADER -> {
          while (results.size() <= frame.getHeader().getInputIndex()) {
            results.add(List.of());
          }
          results.set(frame.getHeader().getInputIndex(), named(frame.getHeader().getResult()));
        }
        case CHUNK -> {
          TensorChunk chunk = frame.getChunk();
          NamedTensor tensor = results.get(chunk.getInputIndex()).get(chunk.getTensor());
          if (chunk.getOffset() != tensor.data.size()) {
            throw new IllegalStateException(
                "a chunk at " + chunk.getOffset() + ", after " + tensor.data.size() + " bytes");
          }
          tensor.data = tensor.data.concat(chunk.getData()); // a rope: nothing is copied
        }
        case END -> {
          status = frame.getEnd().getStatus();
          ended = true;
          if (status.getCode() != 0) {
            results.clear(); // A failed request keeps nothing that was sent.
          }
        }
        default -> throw new IllegalStateException("a frame of an unknown kind");
      }
    }
  }

  /** The tensors of a result in the order of its fields, which is how TensorChunk counts them. */
  private static List<NamedTensor> named(EncodeResult result) {
    List<NamedTensor> found = new ArrayList<>();
    // The fields that are present, in the order of their numbers.
    result
        .getAllFields()
        .forEach(
            (field, value) -> {
              List<?> values = value instanceof List<?> list ? list : List.of(value);
              for (Object one : values) {
                if (one instanceof Tensor tensor) {
                  String name = field.isRepeated() ? "embedding" : field.getName();
                  found.add(new NamedTensor(name, tensor));
                }
              }
            });
    return found;
  }

  /** The elements of a float32 tensor, row by row. */
  private static FloatBuffer floats(ByteString data) {
    return data.asReadOnlyByteBuffer().order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer();
  }

  private static void printTensors(String label, List<NamedTensor> tensors) {
    for (NamedTensor one : tensors) {
      if (one.tensor.getDtype() != DataType.DATA_TYPE_FLOAT32) {
        throw new IllegalStateException("this program reads float32, not " + one.tensor.getDtype());
      }
      FloatBuffer values = floats(one.data);
      String shape =
          one.tensor.getShapeList().stream().map(String::valueOf).collect(Collectors.joining(" "));
      print(
          "  %s: %s [%s]: %.4f %.4f … %.4f",
          label, one.name, shape, values.get(0), values.get(1), values.get(values.limit() - 1));
    }
  }

  /** Prints an error with its details: what a program can act on. */
  private static void printStatus(com.google.rpc.Status status) {
    print("  %s: %s", Status.fromCodeValue(status.getCode()).getCode(), status.getMessage());
    try {
      for (Any detail : status.getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          print("    reason %s", detail.unpack(ErrorInfo.class).getReason());
        } else if (detail.is(BadRequest.class)) {
          for (var violation : detail.unpack(BadRequest.class).getFieldViolationsList()) {
            print("    field %s: %s", violation.getField(), violation.getDescription());
          }
        } else if (detail.is(RetryInfo.class)) {
          var delay = detail.unpack(RetryInfo.class).getRetryDelay();
          print("    try again in %.1f s", delay.getSeconds() + delay.getNanos() / 1e9);
        }
      }
    } catch (InvalidProtocolBufferException error) {
      throw new IllegalStateException(error);
    }
  }

  /** A request that no model can answer. */
  private static EncodeRequest refused() {
    OutputSelection outputs = OutputSelection.newBuilder().setLastHiddenState(true).build();
    return request(outputs, "a text").toBuilder().setMaxTokens(1_000_000).build();
  }

  private static EncodeRequest request(OutputSelection outputs, String... texts) {
    EncodeRequest.Builder request = EncodeRequest.newBuilder().setOutputs(outputs);
    Stream.of(texts).forEach(text -> request.addInputs(Input.newBuilder().setText(text)));
    return request.build();
  }

  private static void print(String format, Object... values) {
    OUT.printf(Locale.ROOT, format + "%n", values);
  }
}
