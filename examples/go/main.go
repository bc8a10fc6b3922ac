// Asks a Layertap server what is inside its model: by Encode, and by EncodeStream in all kinds of frames.
// It also shows the details of a refused request.
//
// Usage: client [ADDRESS]
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"math"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "layertap.example/client/gen/layertap/v1"
)

// Of each call. The server refuses at once what it cannot answer in this time.
const timeout = 30 * time.Second

func main() {
	address := "127.0.0.1:50051"
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	if err := run(address); err != nil {
		fmt.Println("failed:")
		printStatus(status.Convert(err))
		os.Exit(1)
	}
}

func run(address string) error {
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// The size of replies is limited by the server (Model.limits).
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
	}
	first, err := grpc.NewClient(address, options...)
	if err != nil {
		return err
	}
	defer first.Close()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	described, err := pb.NewEncoderServiceClient(first).GetModel(ctx, &pb.GetModelRequest{})
	if err != nil {
		return err
	}
	model := described.Model
	fmt.Printf("%s: %d layers, %d heads, %d connections\n",
		model.Name, model.NumLayers, model.NumAttentionHeads, max(1, model.Connections))

	// A server may have several processes, and a connection leads to one of them.
	conns := make([]*grpc.ClientConn, max(1, model.Connections))
	for i := range conns {
		if conns[i], err = grpc.NewClient(address, options...); err != nil {
			return err
		}
		defer conns[i].Close()
	}
	var next atomic.Uint64
	client := func() pb.EncoderServiceClient {
		return pb.NewEncoderServiceClient(conns[next.Add(1)%uint64(len(conns))])
	}

	fmt.Println("Encode:")
	if err := encode(client()); err != nil {
		return err
	}
	fmt.Println("EncodeStream:")
	if err := encodeStream(client()); err != nil {
		return err
	}
	fmt.Println("a refused request:")
	ctx, cancel = context.WithTimeout(context.Background(), timeout)
	defer cancel()
	_, err = client().Encode(ctx, refused())
	printStatus(status.Convert(err))
	return nil
}

// encode asks for an embedding and for where the first token looks, in one call.
func encode(client pb.EncoderServiceClient) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	reply, err := client.Encode(ctx, &pb.EncodeRequest{
		Inputs: inputs("a text", "another text"),
		Outputs: &pb.OutputSelection{
			Tokens:     true,
			Embeddings: []*pb.EmbeddingSpec{{}}, // as configured with the model
			Attentions: &pb.AttentionSelection{
				Layers:         []int32{-1},
				MeanOverHeads:  true,
				QueryPositions: []int32{0},
			},
		},
	})
	if err != nil {
		return err
	}
	for i, result := range reply.Results {
		printTensors(fmt.Sprint(i), result)
		// The shape is (1, 1, 1, T): one layer, one mean of heads, one row.
		for column, weight := range floats(result.Attentions) {
			fmt.Printf("  %d: looks at %s with %.4f\n", i, result.Tokens.Tokens[column], weight)
		}
	}
	return nil
}

// encodeStream sends some small requests, a large one and a refused one, and reads the answers meanwhile.
func encodeStream(client pb.EncoderServiceClient) error {
	requests := map[uint64]*pb.EncodeRequest{}
	for id := uint64(1); id <= 8; id++ {
		requests[id] = &pb.EncodeRequest{
			Inputs:  inputs(fmt.Sprintf("text %d", id)),
			Outputs: &pb.OutputSelection{Embeddings: []*pb.EmbeddingSpec{{}}},
		}
	}
	requests[9] = &pb.EncodeRequest{
		Inputs: inputs("a text", strings.Repeat("text ", 250)),
		Outputs: &pb.OutputSelection{
			HiddenStates: &pb.HiddenStateSelection{}, // of all layers
			Attentions:   &pb.AttentionSelection{Layers: []int32{0, -1}},
		},
		Truncation: pb.Truncation_TRUNCATION_END,
	}
	requests[10] = refused()

	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	stream, err := client.EncodeStream(ctx)
	if err != nil {
		return err
	}
	go func() {
		for id, request := range requests {
			message := &pb.EncodeStreamRequest{
				RequestId: id, Request: request, AcceptsWhole: true, AcceptsGrouped: true,
			}
			if stream.Send(message) != nil {
				return // Recv returns the error.
			}
		}
		stream.CloseSend()
	}()

	answers := map[uint64]*answer{}
	for id, request := range requests {
		answers[id] = &answer{results: make([]*pb.EncodeResult, len(request.Inputs))}
	}
	for {
		message, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		frames := []*pb.EncodeStreamResponse{message}
		if grouped := message.GetGrouped(); grouped != nil {
			frames = grouped.Frames
		}
		for _, frame := range frames {
			if err := answers[frame.RequestId].read(frame); err != nil {
				return fmt.Errorf("request %d: %w", frame.RequestId, err)
			}
		}
	}

	for id := uint64(1); id <= 10; id++ {
		answer := answers[id]
		switch {
		case !answer.ended:
			return fmt.Errorf("request %d has no answer", id)
		case answer.status.Code() != 0:
			fmt.Printf("  %d:\n", id)
			printStatus(answer.status)
		default:
			for i, result := range answer.results {
				printTensors(fmt.Sprintf("%d.%d", id, i), result)
			}
		}
	}
	return nil
}

// answer is what has arrived for one request on a stream.
type answer struct {
	results []*pb.EncodeResult
	status  *status.Status
	ended   bool
}

func (a *answer) read(frame *pb.EncodeStreamResponse) error {
	switch frame := frame.Frame.(type) {
	case *pb.EncodeStreamResponse_Whole:
		a.results, a.ended = frame.Whole.Results, true
	case *pb.EncodeStreamResponse_Header:
		a.results[frame.Header.InputIndex] = frame.Header.Result
	case *pb.EncodeStreamResponse_Chunk:
		chunk := frame.Chunk
		tensor := tensors(a.results[chunk.InputIndex])[chunk.Tensor].tensor
		if uint64(len(tensor.Data)) != chunk.Offset {
			return fmt.Errorf("a chunk at %d, after %d bytes", chunk.Offset, len(tensor.Data))
		}
		tensor.Data = append(tensor.Data, chunk.Data...)
	case *pb.EncodeStreamResponse_End:
		a.status, a.ended = status.FromProto(frame.End.Status), true
	default:
		return fmt.Errorf("a frame of an unknown kind")
	}
	return nil
}

type named struct {
	name   string
	tensor *pb.Tensor
}

// tensors are those of a result in the order of its fields, which is how TensorChunk counts them.
func tensors(result *pb.EncodeResult) []named {
	all := []named{
		{"last_hidden_state", result.LastHiddenState},
		{"pooler_output", result.PoolerOutput},
		{"hidden_states", result.HiddenStates},
		{"attentions", result.Attentions},
	}
	for _, one := range result.Embeddings {
		all = append(all, named{"embedding", one})
	}
	all = append(all,
		named{"logits", result.Logits},
		named{"logit_ids", result.LogitIds},
		named{"sparse_ids", result.SparseIds},
		named{"sparse_weights", result.SparseWeights},
		named{"contacts", result.Contacts},
	)
	var present []named
	for _, one := range all {
		if one.tensor != nil {
			present = append(present, one)
		}
	}
	return present
}

// floats are the elements of a float32 tensor, row by row.
func floats(tensor *pb.Tensor) []float32 {
	if tensor.Dtype != pb.DataType_DATA_TYPE_FLOAT32 {
		log.Fatalf("this program reads float32, not %s", tensor.Dtype)
	}
	values := make([]float32, len(tensor.Data)/4)
	for i := range values {
		values[i] = math.Float32frombits(binary.LittleEndian.Uint32(tensor.Data[4*i:]))
	}
	return values
}

func printTensors(label string, result *pb.EncodeResult) {
	for _, one := range tensors(result) {
		values := floats(one.tensor)
		fmt.Printf("  %s: %s %v: %.4f %.4f … %.4f\n",
			label, one.name, one.tensor.Shape, values[0], values[1], values[len(values)-1])
	}
}

// printStatus prints an error with its details: what a program can act on.
func printStatus(refusal *status.Status) {
	fmt.Printf("  %s: %s\n", code.Code(refusal.Code()), refusal.Message())
	for _, detail := range refusal.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			fmt.Printf("    reason %s\n", detail.Reason)
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				fmt.Printf("    field %s: %s\n", violation.Field, violation.Description)
			}
		case *errdetails.RetryInfo:
			fmt.Printf("    try again in %.1f s\n", detail.RetryDelay.AsDuration().Seconds())
		}
	}
}

// refused is a request that no model can answer.
func refused() *pb.EncodeRequest {
	return &pb.EncodeRequest{
		Inputs:    inputs("a text"),
		Outputs:   &pb.OutputSelection{LastHiddenState: true},
		MaxTokens: 1_000_000,
	}
}

func inputs(texts ...string) []*pb.Input {
	var all []*pb.Input
	for _, text := range texts {
		all = append(all, &pb.Input{Content: &pb.Input_Text{Text: text}})
	}
	return all
}
