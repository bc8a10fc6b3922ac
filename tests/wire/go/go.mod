module layertap.example/wire

go 1.23.0

require (
	google.golang.org/genproto/googleapis/rpc v0.0.0-20250603155806-513f23925822
	google.golang.org/protobuf v1.36.6
)
