{{/* Parts that the four Deployments share. Each takes a dict of root and component. */}}

{{- define "dspark.deploymentSpec" -}}
{{- $values := index .root.Values .component -}}
{{- if not ($values.autoscaling).enabled -}}
replicas: {{ $values.replicas }}
{{ else -}}
{{- /* Were it left out of a Deployment that had it, Kubernetes would go down to one pod. */ -}}
{{- $running := lookup "apps/v1" "Deployment" .root.Release.Namespace (include "dspark.componentName" .) -}}
{{- with $running.spec }}replicas: {{ .replicas }}
{{ end -}}
{{ end -}}
revisionHistoryLimit: 5
progressDeadlineSeconds: {{ include "dspark.progressSeconds" . }}
selector:
  matchLabels:
    {{- include "dspark.selectorLabels" . | nindent 4 }}
strategy:
  {{- if $values.strategy }}
  {{- toYaml $values.strategy | nindent 2 }}
  {{- else }}
  type: RollingUpdate
  rollingUpdate:
    maxSurge: 1
    maxUnavailable: 0
  {{- end }}
{{- end -}}

{{/*
A gateway is ready once a verifier is. Init containers may download a model, which start-up probes do not count.
*/}}
{{- define "dspark.progressSeconds" -}}
{{- $seconds := int (index .root.Values .component).startupSeconds -}}
{{- if eq .component "gateway" -}}
{{- $seconds = max $seconds (int .root.Values.verifier.startupSeconds) -}}
{{- end -}}
{{- $downloads := and .root.Values.model.initContainers (ne .component "scheduler") -}}
{{- add $seconds 300 (ternary 1800 0 (not (empty $downloads))) -}}
{{- end -}}

{{- define "dspark.podMetadata" -}}
{{- $values := index .root.Values .component -}}
labels:
  {{- include "dspark.labels" . | nindent 2 }}
  {{- with $values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  checksum/config: {{ include (print .root.Template.BasePath "/configmap.yaml") .root | sha256sum }}
  {{- with $values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "dspark.podSpec" -}}
{{- $root := .root -}}
{{- $values := index $root.Values .component -}}
{{- $selector := include "dspark.selectorLabels" . -}}
{{- if and (eq .component "scheduler") (eq (include "dspark.leaderElection" $root) "lease") }}
# It alone talks to the API server, of one Lease.
serviceAccountName: {{ include "dspark.schedulerServiceAccountName" $root | quote }}
automountServiceAccountToken: true
{{- else }}
serviceAccountName: {{ include "dspark.serviceAccountName" $root | quote }}
automountServiceAccountToken: false
{{- end }}
# A Service called dspark would put DSPARK_PORT=tcp://... into every pod of the namespace.
enableServiceLinks: false
# preStop, the drain, then closing down, which may wait for the last spans to be sent.
terminationGracePeriodSeconds: {{ add 5 (include "dspark.drainSeconds" .) 20 }}
{{- with $root.Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- if $values.topologySpreadConstraints }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- $selector | nindent 8 }}
  {{- end }}
{{- end -}}

{{- define "dspark.container" -}}
{{- $root := .root -}}
{{- $values := index $root.Values .component -}}
image: {{ include "dspark.image" . | quote }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
resources:
  {{- toYaml (default dict $values.resources) | nindent 2 }}
envFrom:
  - configMapRef:
      name: {{ include "dspark.fullname" $root | quote }}
  {{- with $values.envFrom }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
# Endpoints go first, so that no new connection arrives while the service drains.
lifecycle:
  preStop:
    exec:
      command: [sleep, "5"]
{{ include "dspark.probes" . }}
{{- end -}}

{{/*
gRPC health is SERVING from the end of warm-up to the start of the drain. A gateway is ready once a verifier
is, which may take long and is no reason to restart it: it counts as started when its HTTP port answers.
A kubelet has no certificate: with TLS the same is asked of the port of the metrics.
*/}}
{{- define "dspark.probes" -}}
{{- $values := index .root.Values .component -}}
{{- $ready := printf "grpc:\n  port: %s" (include "dspark.grpcPort" .) -}}
{{- $alive := $ready -}}
{{- if eq .component "gateway" }}
{{- $alive = "httpGet:\n  path: /healthz\n  port: http" -}}
{{- else if (.root.Values.tls).existingSecret }}
{{- $ready = "httpGet:\n  path: /readyz\n  port: metrics" -}}
{{- $alive = $ready -}}
{{- end -}}
startupProbe:
  {{- $alive | nindent 2 }}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ div $values.startupSeconds 2 }}
readinessProbe:
  {{- $ready | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
livenessProbe:
  {{- $alive | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{/* The service's own, else that of all. */}}
{{- define "dspark.drainSeconds" -}}
{{- $own := (index .root.Values .component).drainSeconds -}}
{{- if has (toString $own) (list "" "<nil>") }}{{ .root.Values.drainSeconds }}{{ else }}{{ $own }}{{ end -}}
{{- end -}}

{{/* Variables of one service; what all share is in the ConfigMap. */}}
{{- define "dspark.env" -}}
- name: DSPARK_PORT
  value: {{ include "dspark.grpcPort" . | quote }}
- name: OTEL_SERVICE_NAME
  value: dspark-{{ .component }}
{{- if ne (include "dspark.drainSeconds" .) (toString .root.Values.drainSeconds) }}
- name: DSPARK_DRAIN_SECONDS
  value: {{ include "dspark.drainSeconds" . | quote }}
{{- end }}
{{- if and (eq .component "gateway") .root.Values.gateway.keysSecret }}
- name: DSPARK_KEYS_FILE
  value: /etc/dspark/keys/keys.toml
{{- end }}
{{- end -}}

{{/*
The user's own. None may be one the chart sets for a service: server-side apply refuses a list with doubles. And none
of the ConfigMap's from which the chart derives more: ports, probes and mounts, the time a pod is given to end.
*/}}
{{- define "dspark.extraEnv" -}}
{{- $reserved := list "DSPARK_PORT" "DSPARK_HTTP_PORT" "DSPARK_ADVERTISE_ADDRESS" "DSPARK_DRAFTER_ADDRESS" "OTEL_SERVICE_NAME" "POD_IP" "REDIS_URL" "DSPARK_REDIS_PREFIX" "DSPARK_LEADER_ELECTION" "DSPARK_LEADER_LEASE_NAME" "DSPARK_LEADER_LEASE_NAMESPACE" -}}
{{- $reserved = concat $reserved (list "DSPARK_DRAIN_SECONDS" "DSPARK_METRICS_PORT" "DSPARK_SCHEDULER_ADDRESS" "DSPARK_TLS_CERT" "DSPARK_TLS_KEY" "DSPARK_TLS_CA" "DSPARK_TLS_NAME" "DSPARK_KEYS_FILE") -}}
{{- range $name, $value := (index .root.Values .component).env }}
{{- if has $name $reserved }}
{{- fail (printf "%s.env.%s: the chart sets this variable itself" $.component $name) }}
{{- end }}
- name: {{ $name | quote }}
  value: {{ include "dspark.plainText" $value | quote }}
{{- end }}
{{- end -}}

{{/* Numbers of a file of values are floats to helm, and from a million on it would write 1e+06. */}}
{{- define "dspark.plainText" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{ printf "%.0f" . }}
{{- else -}}
{{ . }}
{{- end -}}
{{- end -}}

{{/* What drafter and verifier need besides: the address they register, and threads that fit their CPU. */}}
{{- define "dspark.engineEnv" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: DSPARK_ADVERTISE_ADDRESS
  value: "$(POD_IP):{{ include "dspark.grpcPort" . }}"
{{- $values := index .root.Values .component }}
{{- $env := default dict $values.env }}
{{- if and (dig "resources" "limits" "cpu" "" $values) (not (hasKey $env "DSPARK_TORCH_THREADS")) }}
- name: DSPARK_TORCH_THREADS
  valueFrom:
    resourceFieldRef:
      resource: limits.cpu
{{- end }}
{{- range $variable, $folder := dict "TRITON_CACHE_DIR" "triton" "TORCHINDUCTOR_CACHE_DIR" "inductor" }}
{{- if not (hasKey $env $variable) }}
- name: {{ $variable }}
  value: {{ include "dspark.compiledPath" $ }}/{{ $folder }}
{{- end }}
{{- end }}
{{- end -}}

{{/*
Triton compiles kernels for the GPU at hand and loads them as shared libraries. They get a folder of their own, which a
restarted container finds again, so that /tmp may be noexec (where a node or an admission policy makes it so) and the root
stays read-only. It is the pod's alone and gone with it; only who already runs code in the process can put code there.
*/}}
{{- define "dspark.compiledPath" -}}
/var/cache/dspark
{{- end -}}

{{- define "dspark.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if has .component (list "drafter" "verifier") }}
- name: compiled
  mountPath: {{ include "dspark.compiledPath" . }}
{{- end }}
{{- if (index .root.Values .component).sharedMemory }}
- name: shared-memory
  mountPath: /dev/shm
{{- end }}
{{- if and (ne .component "scheduler") (ne (include "dspark.volumeType" .root) "none") }}
- name: models
  mountPath: {{ (.root.Values.model.volume).mountPath | quote }}
  readOnly: {{ (.root.Values.model.volume).readOnly }}
{{- end }}
{{- if and (eq .component "gateway") .root.Values.gateway.keysSecret }}
- name: keys
  mountPath: /etc/dspark/keys
  readOnly: true
{{- end }}
{{- if (.root.Values.tls).existingSecret }}
- name: tls
  mountPath: /etc/dspark/tls
  readOnly: true
{{- end }}
{{- end -}}

{{- define "dspark.volumes" -}}
{{- $volume := default dict .root.Values.model.volume -}}
{{- $type := include "dspark.volumeType" .root -}}
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
{{- if has .component (list "drafter" "verifier") }}
- name: compiled
  emptyDir:
    sizeLimit: 1Gi
{{- end }}
{{- with (index .root.Values .component).sharedMemory }}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ . | quote }}
{{- end }}
{{- if and (ne .component "scheduler") (ne $type "none") }}
- name: models
  {{- if eq $type "pvc" }}
  persistentVolumeClaim:
    claimName: {{ include "dspark.modelClaim" .root | quote }}
  {{- else if eq $type "hostPath" }}
  hostPath:
    path: {{ required "model.volume.hostPath must be set when model.volume.type is hostPath" $volume.hostPath | quote }}
    type: Directory
  {{- else }}
  emptyDir:
    sizeLimit: {{ $volume.size | quote }}
  {{- end }}
{{- end }}
{{- if and (eq .component "gateway") .root.Values.gateway.keysSecret }}
- name: keys
  secret:
    secretName: {{ .root.Values.gateway.keysSecret | quote }}
    defaultMode: 0440
{{- end }}
{{- with (.root.Values.tls).existingSecret }}
- name: tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{/*
The user's own init containers, with the model volume mounted for writing and /tmp, unless they mount something there,
and with a security context that the pod security level `restricted` accepts, unless they have one.
*/}}
{{- define "dspark.initContainers" -}}
{{- $model := .root.Values.model -}}
{{- if and $model.initContainers (eq (include "dspark.volumeType" .root) "none") -}}
{{- fail "model.initContainers are set, but model.volume.type is none: there is no volume that they could fill" -}}
{{- end -}}
{{- if $model.initContainers -}}
initContainers:
  {{- $security := dict "allowPrivilegeEscalation" false "capabilities" (dict "drop" (list "ALL")) }}
  {{- range $model.initContainers }}
  {{- $mounts := default list .volumeMounts }}
  {{- $taken := list }}
  {{- range $mounts }}{{ $taken = append $taken (trimSuffix "/" .mountPath) }}{{ end }}
  {{- range $name, $path := dict "models" $model.volume.mountPath "tmp" "/tmp" }}
  {{- if not (has (trimSuffix "/" $path) $taken) }}
  {{- $mounts = append $mounts (dict "name" $name "mountPath" $path) }}
  {{- end }}
  {{- end }}
  {{- $defaults := ternary dict (dict "securityContext" $security) (hasKey . "securityContext") }}
  -
    {{- toYaml (merge (dict "volumeMounts" $mounts) . $defaults) | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}
